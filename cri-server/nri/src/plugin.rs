//! A plugin: its registration, what it has subscribed to, and the calls to it. It is called once at a time, as
//! plugins are written for; one that does not answer in time, or whose connection ends, is closed and passed over.

use std::sync::Mutex as StdMutex;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use prost::Message as _;
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::sync::{Mutex, mpsc};

use crate::api::{self, Event};
use crate::connection::{CallError, Connection, Serve, chain};
use crate::error::Error;
use crate::ttrpc::{Status, code};
use crate::{Runtime, Wanted};

/// Every event that this runtime knows, as a mask.
const ALL: i32 = (1 << (Event::Last as i32 - 1)) - 1;
/// The interface's version that this side speaks.
const NRI_VERSION: &str = "v0.12.0";

/// Limits of a plugin.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) registration: Duration,
    pub(crate) request: Duration,
}

/// Who a pre-installed plugin is, by its file's name, and its configuration.
#[derive(Debug, Clone)]
pub(crate) struct Installed {
    pub(crate) index: String,
    pub(crate) name: String,
    pub(crate) config: String,
}

/// Why a plugin was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("it did not register within {0:?}")]
    Late(Duration),
    #[error("its connection ended before it was registered: {0}")]
    Ended(String),
    #[error("it cannot be configured")]
    Configure(#[source] CallError),
    #[error("it subscribes to events that do not exist (mask {0:#x})")]
    Events(i32),
    #[error("it cannot be synchronized")]
    Synchronize(#[source] CallError),
    #[error("it does not take the state in parts")]
    Parts,
}

/// A plugin that is registered.
pub(crate) struct Plugin {
    pub(crate) index: String,
    pub(crate) name: String,
    events: i32,
    connection: Connection,
    turn: Mutex<()>,
    limits: Limits,
    child: StdMutex<Option<Child>>,
}

/// What a plugin may call.
struct Service {
    registrations: mpsc::Sender<api::RegisterPluginRequest>,
    external: bool,
    runtime: Arc<dyn Runtime>,
}

#[async_trait::async_trait]
impl Serve for Service {
    async fn serve(&self, method: &str, payload: &[u8]) -> Result<Vec<u8>, Status> {
        let refused = |code: i32, message: String| Status { code, message };
        let garbled = |e: prost::DecodeError| refused(code::INVALID_ARGUMENT, e.to_string());
        match method {
            "RegisterPlugin" => {
                let request = api::RegisterPluginRequest::decode(payload).map_err(garbled)?;
                if self.external {
                    verify_name(&request.plugin_name).map_err(|e| refused(code::INVALID_ARGUMENT, e))?;
                    verify_index(&request.plugin_idx).map_err(|e| refused(code::INVALID_ARGUMENT, e))?;
                }
                let twice = || refused(code::FAILED_PRECONDITION, "it is registered already".to_owned());
                self.registrations.try_send(request).map_err(|_| twice())?;
                Ok(api::Empty {}.encode_to_vec())
            }
            "UpdateContainers" => {
                let request = api::UpdateContainersRequest::decode(payload).map_err(garbled)?;
                let wanted = Wanted {
                    updates: request.update,
                    evictions: request.evict,
                };
                let failed = self.runtime.change(wanted).await;
                Ok(api::UpdateContainersResponse { failed }.encode_to_vec())
            }
            other => Err(refused(code::UNIMPLEMENTED, format!("there is no call {other}"))),
        }
    }
}

/// Names go to logs and messages.
///
/// # Errors
/// What is wrong.
pub(crate) fn verify_name(name: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
    if name.is_empty() || name.len() > 128 || !name.chars().all(allowed) {
        return Err(format!(
            "plugin name {name:?} is not of letters, digits, '-', '_', '.' and '+'"
        ));
    }
    Ok(())
}

/// Two digits.
///
/// # Errors
/// What is wrong.
pub(crate) fn verify_index(index: &str) -> Result<(), String> {
    if index.len() != 2 || !index.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!("plugin index {index:?} is not of two digits"));
    }
    Ok(())
}

impl Plugin {
    /// Waits for a plugin to register and configures it.
    ///
    /// # Errors
    /// [`Refusal`]; the connection is closed then.
    pub(crate) async fn register(
        stream: UnixStream,
        installed: Option<(Installed, Child)>,
        limits: Limits,
        runtime: Arc<dyn Runtime>,
    ) -> Result<Self, Refusal> {
        let (registrations, mut registered) = mpsc::channel(1);
        let service = Service {
            registrations,
            external: installed.is_none(),
            runtime,
        };
        let connection = Connection::start(stream, Arc::new(service));
        let (identity, child) = installed.map_or((None, None), |(i, c)| (Some(i), Some(c)));
        let mut plugin = Self {
            index: String::new(),
            name: String::new(),
            events: ALL,
            connection,
            turn: Mutex::default(),
            limits,
            child: StdMutex::new(child),
        };
        let result = plugin.begin(&mut registered, identity).await;
        if let Err(refusal) = &result {
            plugin.close(&refusal.to_string());
        }
        result.map(|()| plugin)
    }

    async fn begin(
        &mut self,
        registered: &mut mpsc::Receiver<api::RegisterPluginRequest>,
        identity: Option<Installed>,
    ) -> Result<(), Refusal> {
        let request = tokio::select! {
            request = registered.recv() => request,
            why = self.connection.closed() => return Err(Refusal::Ended(why)),
            () = tokio::time::sleep(self.limits.registration) => return Err(Refusal::Late(self.limits.registration)),
        };
        let request = request.ok_or_else(|| Refusal::Ended(String::new()))?;
        let config = match identity {
            Some(installed) => {
                (self.index, self.name) = (installed.index, installed.name);
                installed.config
            }
            None => {
                (self.index, self.name) = (request.plugin_idx, request.plugin_name);
                String::new()
            }
        };
        let millis = |limit: Duration| i64::try_from(limit.as_millis()).unwrap_or(i64::MAX);
        let configure = api::ConfigureRequest {
            config,
            runtime_name: "catamaran".to_owned(),
            runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
            registration_timeout: millis(self.limits.registration),
            request_timeout: millis(self.limits.request),
            nri_version: NRI_VERSION.to_owned(),
        };
        let answer: api::ConfigureResponse = self
            .connection
            .call("Configure", &configure, self.limits.request)
            .await
            .map_err(Refusal::Configure)?;
        if answer.events & !ALL != 0 {
            return Err(Refusal::Events(answer.events & !ALL));
        }
        if answer.events != 0 {
            self.events = answer.events;
        }
        Ok(())
    }

    /// Index and name, as in messages and logs.
    pub(crate) fn full_name(&self) -> String {
        format!("{}-{}", self.index, self.name)
    }

    /// It has asked for this event.
    pub(crate) fn wants(&self, event: Event) -> bool {
        self.events & (1 << (event as i32 - 1)) != 0
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.connection.is_closed()
    }

    pub(crate) async fn closed(&self) -> String {
        self.connection.closed().await
    }

    /// Resolves when the connection has ended.
    pub(crate) fn ended(&self) -> impl Future<Output = ()> + Send + 'static {
        let connection = self.connection.clone();
        async move { drop(connection.closed().await) }
    }

    /// Ends the connection, and waits for the process where the runtime started it.
    pub(crate) async fn end(&self, why: &str) {
        let child = self.child.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.connection.close(why);
        if let Some(child) = child {
            reap(child).await;
        }
    }

    /// Ends the connection, and the process where the runtime started it.
    pub(crate) fn close(&self, why: &str) {
        self.connection.close(why);
        let child = self.child.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(child) = child {
            tokio::spawn(reap(child));
        }
    }

    /// Tells the plugin everything that is there, in as many messages as it takes, within the limit of one request.
    ///
    /// # Errors
    /// [`Refusal`].
    pub(crate) async fn synchronize(
        &self,
        pods: Vec<api::PodSandbox>,
        containers: Vec<api::Container>,
    ) -> Result<Vec<api::ContainerUpdate>, Refusal> {
        let end = tokio::time::Instant::now() + self.limits.request;
        let parts = parts(pods, containers, crate::ttrpc::MAX_MESSAGE / 2);
        for part in parts {
            let left = end.saturating_duration_since(tokio::time::Instant::now());
            let answer: api::SynchronizeResponse = self
                .connection
                .call("Synchronize", &part, left)
                .await
                .map_err(Refusal::Synchronize)?;
            if !part.more {
                return Ok(answer.update);
            }
            if !answer.more || !answer.update.is_empty() {
                return Err(Refusal::Parts);
            }
        }
        Ok(Vec::new())
    }

    /// Asks the plugin where it wants the event. `None`: it does not, or it is no more.
    ///
    /// # Errors
    /// [`Error::Refused`] with the plugin's own words.
    pub(crate) async fn ask<Q: prost::Message, A: prost::Message + Default>(
        &self,
        event: Event,
        method: &'static str,
        message: &Q,
    ) -> Result<Option<A>, Error> {
        if !self.wants(event) {
            return Ok(None);
        }
        self.call(method, message).await
    }

    async fn call<Q: prost::Message, A: prost::Message + Default>(
        &self,
        method: &'static str,
        message: &Q,
    ) -> Result<Option<A>, Error> {
        let _turn = self.turn.lock().await;
        if self.is_closed() {
            return Ok(None);
        }
        match self.connection.call(method, message, self.limits.request).await {
            Ok(answer) => Ok(Some(answer)),
            Err(source) if source.is_plugins_word() || matches!(source, CallError::TooLong(_)) => {
                Err(Error::Refused {
                    plugin: self.full_name(),
                    request: method,
                    source,
                })
            }
            Err(error) => {
                let why = format!("{method}: {}", chain(&error));
                tracing::warn!(plugin = self.full_name(), why, "closing an NRI plugin");
                self.close(&why);
                Ok(None)
            }
        }
    }

    /// Tells the plugin of an event that it cannot change. One that knows no call for it is told by StateChange,
    /// as plugins of older versions are.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub(crate) async fn tell<Q: prost::Message>(
        &self,
        event: Event,
        method: &'static str,
        message: &Q,
        change: impl FnOnce() -> api::StateChangeEvent,
    ) -> Result<(), Error> {
        match self.ask::<Q, api::Empty>(event, method, message).await {
            Err(Error::Refused {
                source:
                    CallError::Status {
                        code: code::UNIMPLEMENTED,
                        ..
                    },
                ..
            }) => self
                .call::<_, api::Empty>("StateChange", &change())
                .await
                .map(drop),
            other => other.map(drop),
        }
    }

    /// Lets a validating plugin judge. One that gives no judgement has not approved.
    ///
    /// # Errors
    /// [`Error::Rejected`], [`Error::Refused`].
    pub(crate) async fn validate(
        &self,
        request: &api::ValidateContainerAdjustmentRequest,
    ) -> Result<(), Error> {
        let rejected = |reason: String| Error::Rejected {
            plugin: self.full_name(),
            reason,
        };
        let answer: Option<api::ValidateContainerAdjustmentResponse> = self
            .ask(
                Event::ValidateContainerAdjustment,
                "ValidateContainerAdjustment",
                request,
            )
            .await?;
        match answer {
            Some(answer) if answer.reject => Err(rejected(answer.reason)),
            Some(_) => Ok(()),
            None => Err(rejected("it has not answered".to_owned())),
        }
    }
}

/// A plugin ends by itself when its socket does; else it is killed.
async fn reap(mut child: Child) {
    let ended = tokio::time::timeout(Duration::from_secs(1), child.wait()).await;
    if ended.is_err()
        && let Err(error) = child.kill().await
    {
        tracing::warn!(%error, "an NRI plugin's process stays");
    }
}

/// Cuts the state into messages of at most `limit` bytes, as far as single objects are not longer.
fn parts(
    pods: Vec<api::PodSandbox>,
    containers: Vec<api::Container>,
    limit: usize,
) -> Vec<api::SynchronizeRequest> {
    let mut parts = vec![api::SynchronizeRequest::default()];
    let mut size = 0;
    let mut room = |parts: &mut Vec<api::SynchronizeRequest>, length: usize| {
        if size > 0 && size + length > limit {
            if let Some(last) = parts.last_mut() {
                last.more = true;
            }
            parts.push(api::SynchronizeRequest::default());
            size = 0;
        }
        // The field's tag and length besides.
        size += length + 8;
    };
    for pod in pods {
        room(&mut parts, pod.encoded_len());
        if let Some(last) = parts.last_mut() {
            last.pods.push(pod);
        }
    }
    for container in containers {
        room(&mut parts, container.encoded_len());
        if let Some(last) = parts.last_mut() {
            last.containers.push(container);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_is_cut_into_parts_and_only_the_last_says_so() {
        let container = |at: usize| api::Container {
            id: format!("c{at}"),
            args: vec!["x".repeat(100)],
            ..Default::default()
        };
        let pods = vec![api::PodSandbox {
            id: "p".into(),
            ..Default::default()
        }];
        let parts = parts(pods, (0..50).map(container).collect(), 1000);
        assert!(parts.len() > 5);
        assert!(parts.iter().all(|part| part.encoded_len() <= 1100));
        let (last, before) = parts.split_last().unwrap();
        assert!(!last.more && before.iter().all(|part| part.more));
        let all: Vec<&str> = parts
            .iter()
            .flat_map(|p| &p.containers)
            .map(|c| c.id.as_str())
            .collect();
        assert_eq!(all.len(), 50);
        assert_eq!((all[0], all[49]), ("c0", "c49"));
    }

    #[test]
    fn names_and_indices_are_checked() {
        verify_name("a-b_c.d+1").unwrap();
        assert!(verify_name("").is_err() && verify_name("a b").is_err() && verify_name("a/b").is_err());
        verify_index("00").unwrap();
        assert!(verify_index("1").is_err() && verify_index("1a").is_err() && verify_index("100").is_err());
    }
}
