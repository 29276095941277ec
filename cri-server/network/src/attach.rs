//! The chain of plugins for each verb: ADD forward with each result handed on, DEL backward with the last
//! result, STATUS for each (CNI spec, section 3, "Lifecycle & Ordering" and "Derivation of execution
//! configuration").

use std::ffi::OsString;
use std::path::Path;

use serde_json::Value;

use crate::conflist::{ConfList, InForce, Source, checked_id};
use crate::error::{NetworkError, Result};
use crate::plugin::{self, Call, Verb};
use crate::pod::PodNetwork;
use crate::record::{self, Intent};
use crate::result::{Attachment, in_version};
use crate::{NetworkConfig, POD_INTERFACE, netns};

/// See [`crate::Network::attach`].
pub(crate) async fn attach(
    config: &NetworkConfig,
    network: &InForce,
    pod: &PodNetwork,
) -> Result<Attachment> {
    check(pod)?;
    if let Some(earlier) = record::intent(&config.cache_dir, &pod.id)? {
        match record::result(&config.cache_dir, &pod.id)?.map(Attachment::parse) {
            Some(Ok(attachment)) if earlier.pod.netns == pod.netns => return Ok(attachment),
            _ => detach(config, &pod.id).await?,
        }
    }
    network.find_plugins(&config.bin_dirs)?;
    let intent = Intent::new(pod.clone(), network.list_for(pod), config.bin_dirs.clone());
    // A power failure takes all that the default network has: namespaces, interfaces, rules and leases. An
    // operator's plugins may hold an address elsewhere.
    let sync = network.source != Source::Default;
    record::begin(&config.cache_dir, &intent, sync).await?;
    let failure = match add(config, &intent).await {
        Ok(attachment) => match record::complete(&config.cache_dir, &pod.id, &attachment.result).await {
            Ok(()) => return Ok(attachment),
            Err(error) => error,
        },
        Err(error) => error,
    };
    match undo(config, &pod.id).await {
        Ok(()) => Err(failure),
        Err(del) => Err(NetworkError::Undo {
            add: Box::new(failure),
            del: Box::new(del),
        }),
    }
}

/// See [`crate::Network::detach`].
pub(crate) async fn detach(config: &NetworkConfig, id: &str) -> Result<()> {
    if record::intent(&config.cache_dir, id)?.is_some() && record::result(&config.cache_dir, id)?.is_none() {
        record::wait_for_add(&config.cache_dir, id, config.plugin_timeout).await?;
    }
    undo(config, id).await
}

/// DEL, where no ADD can be running.
async fn undo(config: &NetworkConfig, id: &str) -> Result<()> {
    let Some(intent) = record::intent(&config.cache_dir, id)? else {
        return record::forget(&config.cache_dir, id);
    };
    let result = record::result(&config.cache_dir, id)?;
    del(config, &intent, result.as_ref()).await?;
    record::forget(&config.cache_dir, id)
}

/// STATUS of each plugin, where the chain's version has it.
pub(crate) async fn status(config: &NetworkConfig, network: &InForce) -> Result<()> {
    let list = &network.list;
    if !list.has_status() {
        return Ok(());
    }
    for plugin in &list.plugins {
        let stdin = to_stdin(&list.request(plugin, &serde_json::Map::new(), None));
        call(config, &config.bin_dirs, plugin, Verb::Status, &[], &stdin)
            .run()
            .await?;
    }
    Ok(())
}

async fn add(config: &NetworkConfig, intent: &Intent) -> Result<Attachment> {
    let Intent {
        pod, list, bin_dirs, ..
    } = intent;
    let offered = pod.capability_args();
    let variables = variables(pod, Some(&pod.netns));
    let lock = record::lock(&config.cache_dir, &pod.id)?;
    let mut result = None;
    for plugin in &list.plugins {
        let stdin = to_stdin(&list.request(plugin, &offered, result.as_ref()));
        let call = Call {
            lock: Some(&lock),
            ..call(config, bin_dirs, plugin, Verb::Add, &variables, &stdin)
        };
        let stdout = call.run().await?;
        let parsed: Value = serde_json::from_slice(&stdout).map_err(|error| {
            call.protocol(&format!(
                "its result is no JSON ({error}): {}",
                plugin::excerpt(&stdout)
            ))
        })?;
        // Each result is checked, so that a message names the plugin that printed it.
        Attachment::parse(parsed.clone()).map_err(|what| call.protocol(&what))?;
        result = Some(in_version(parsed, &list.cni_version));
    }
    let result = result.ok_or_else(|| NetworkError::NotReady("the chain has no plugin".to_owned()))?;
    Attachment::parse(result).map_err(NetworkError::NotReady)
}

/// DEL of every plugin, also after one failed: what can be given back is. The first error is returned.
async fn del(config: &NetworkConfig, intent: &Intent, result: Option<&Value>) -> Result<()> {
    let Intent {
        pod, list, bin_dirs, ..
    } = intent;
    let offered = pod.capability_args();
    let netns = netns::is_pinned(&pod.netns).then_some(pod.netns.as_path());
    let variables = variables(pod, netns);
    let previous = result.filter(|_| list.del_has_result());
    let mut first_error = None;
    for plugin in list.plugins.iter().rev() {
        let stdin = to_stdin(&list.request(plugin, &offered, previous));
        if let Err(error) = call(config, bin_dirs, plugin, Verb::Del, &variables, &stdin)
            .run()
            .await
        {
            tracing::warn!(sandbox = %pod.id, %error, "network teardown goes on after an error");
            first_error.get_or_insert(error);
        }
    }
    first_error.map_or(Ok(()), Err)
}

fn call<'a>(
    config: &NetworkConfig,
    bin_dirs: &'a [std::path::PathBuf],
    plugin: &'a serde_json::Map<String, Value>,
    verb: Verb,
    variables: &'a [(&'static str, OsString)],
    stdin: &'a [u8],
) -> Call<'a> {
    let plugin = ConfList::plugin_type(plugin);
    Call {
        plugin,
        verb,
        bin_dirs,
        variables,
        stdin,
        limit: config.plugin_timeout,
        lock: None,
    }
}

/// CNI spec, section 2, Parameters. CNI_NETNS is empty where the namespace is gone, which tells a plugin to
/// free what is not in it.
fn variables(pod: &PodNetwork, netns: Option<&Path>) -> Vec<(&'static str, OsString)> {
    vec![
        ("CNI_CONTAINERID", OsString::from(&pod.id)),
        ("CNI_NETNS", netns.map(OsString::from).unwrap_or_default()),
        ("CNI_IFNAME", OsString::from(POD_INTERFACE)),
        ("CNI_ARGS", OsString::from(pod.cni_args())),
    ]
}

fn to_stdin(request: &serde_json::Map<String, Value>) -> Vec<u8> {
    Value::Object(request.clone()).to_string().into_bytes()
}

/// What becomes part of a path, of the environment and of CNI_ARGS must stay one word there.
fn check(pod: &PodNetwork) -> Result<()> {
    checked_id(&pod.id)?;
    for (field, value) in [
        ("namespace", &pod.namespace),
        ("name", &pod.name),
        ("uid", &pod.uid),
    ] {
        if value.contains(|c: char| c == ';' || c.is_control()) {
            return Err(NetworkError::Pod {
                field,
                value: value.chars().take(80).collect(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_add_arguments() {
        let pod = |name: &str| PodNetwork {
            id: "a".to_owned(),
            name: name.to_owned(),
            ..Default::default()
        };
        assert!(check(&pod("web-0")).is_ok());
        for bad in ["a;IP=10.0.0.1", "a\0b", "a\n"] {
            assert!(check(&pod(bad)).unwrap_err().to_string().contains("name"));
        }
        assert!(
            check(&PodNetwork {
                id: "../x".to_owned(),
                ..Default::default()
            })
            .is_err()
        );
    }
}
