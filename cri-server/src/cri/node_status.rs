//! Status: whether pods can be run and networked, what each handler can do, and how VMs run on this node.

use std::collections::HashMap;

use catamaran_sandbox::pod_spec::Acceleration;
use serde_json::json;

use super::api;
use crate::config::{DEFAULT_HANDLER, HandlerType};
use crate::node::Node;

pub(super) async fn status(node: &Node, verbose: bool) -> api::StatusResponse {
    let installed = node
        .handlers
        .resolve(DEFAULT_HANDLER)
        .and_then(|handler| handler.shim().and_then(|_| handler.program()));
    let (runtime_reason, runtime_problem) = match (installed, node.store.problem()) {
        (Err(error), _) => ("RuntimeNotInstalled", error.to_string()),
        // Whatever is begun now would be forgotten by a daemon that is killed.
        (Ok(_), Some(problem)) => ("StoreNotWritable", problem),
        (Ok(_), None) => ("", String::new()),
    };
    let network = node.network.ready().await;
    let condition = |kind: &str, status: bool, reason: &str, message: String| api::RuntimeCondition {
        r#type: kind.to_owned(),
        status,
        reason: if status { String::new() } else { reason.to_owned() },
        message,
    };
    let network_problem = network.as_ref().err().cloned().unwrap_or_default();
    let mut runtime_handlers = Vec::new();
    for handler in node.handlers.iter() {
        let features = handler.features().await;
        let entry = |name: &str| api::RuntimeHandler {
            name: name.to_owned(),
            features: Some(api::RuntimeHandlerFeatures {
                recursive_read_only_mounts: features.recursive_read_only_mounts,
                user_namespaces: features.user_namespaces,
            }),
        };
        if handler.name == DEFAULT_HANDLER {
            // The empty name is the default handler's, as the kubelet looks it up.
            runtime_handlers.push(entry(""));
        }
        runtime_handlers.push(entry(&handler.name));
    }
    let info = if verbose {
        verbose_info(node).await
    } else {
        HashMap::new()
    };
    api::StatusResponse {
        status: Some(api::RuntimeStatus {
            conditions: vec![
                condition(
                    "RuntimeReady",
                    runtime_reason.is_empty(),
                    runtime_reason,
                    runtime_problem,
                ),
                condition(
                    "NetworkReady",
                    network.is_ok(),
                    "NetworkPluginNotReady",
                    network_problem,
                ),
            ],
        }),
        info,
        runtime_handlers,
        features: Some(api::RuntimeFeatures {
            supplemental_groups_policy: true,
            user_namespaces_host_network: false,
        }),
    }
}

async fn verbose_info(node: &Node) -> HashMap<String, String> {
    let verdict = node.handlers.verdict().await;
    let network = match node.network.status() {
        Ok(network) => json!({
            "name": network.name,
            "source": format!("{:?}", network.source),
            "plugins": network.plugins,
            "skipped": network.skipped,
        }),
        Err(problem) => json!({ "problem": problem }),
    };
    let acceleration = match verdict.acceleration() {
        Acceleration::Kvm => json!({ "verdict": "kvm", "reason": verdict.reason }),
        Acceleration::Tcg => json!({
            "verdict": "tcg",
            "reason": verdict.reason,
            "note": "emulated: runs anywhere, slowly; no promise of isolation strength",
        }),
    };
    let handlers: HashMap<&str, serde_json::Value> = node
        .handlers
        .iter()
        .map(|handler| {
            let problem = handler
                .shim()
                .and_then(|_| handler.program())
                .err()
                .map(|e| e.to_string());
            let kind = match handler.kind {
                HandlerType::Oci => "oci",
                HandlerType::Vm => "vm",
            };
            let program = handler.program().ok().map(|path| path.display().to_string());
            (
                handler.name.as_str(),
                json!({ "type": kind, "program": program, "problem": problem }),
            )
        })
        .collect();
    HashMap::from([
        ("acceleration".to_owned(), acceleration.to_string()),
        ("network".to_owned(), network.to_string()),
        ("handlers".to_owned(), json!(handlers).to_string()),
        ("config".to_owned(), json!(node.config).to_string()),
    ])
}
