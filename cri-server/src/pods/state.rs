//! The states of pods and containers, and admission: which request may begin in which state. Pure, so that it
//! can be tested completely; the owner task (owner.rs) is the only one that changes a state.
//!
//! ```text
//! pod:        (request) ─▶ Creating ─▶ Ready ─▶ Stopping ─▶ Stopped ─▶ Removing ─▶ (gone)
//!                            │ undone     │         ▲          ▲
//!                            ▼            ▼ shim or │ VM died  │
//!                          (gone)       Broken ─────┘          │
//!                            │ undo failed: Broken             │
//!
//! container:  (request) ─▶ Creating ─▶ Created ─▶ Starting ─▶ Running ─▶ Stopping ─▶ Exited ─▶ Removing ─▶ (gone)
//!                            │ undone      │          │           │                     ▲
//!                            ▼             └──────────┴───────────┴─── process ended ───┘
//!                          (gone)                    nobody knows how it ended: Unknown ─▶ Removing
//! ```
//! `Creating`, `Stopping`, `Starting` and `Removing` are intents: each is durable before its first side
//! effect, so that a daemon that was killed in the middle undoes or finishes it at its next start.

use serde::{Deserialize, Serialize};

/// State of a pod sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PodState {
    /// RunPodSandbox is at work; not listed yet.
    Creating,
    /// Containers can be created.
    Ready,
    /// StopPodSandbox is at work.
    Stopping,
    /// Nothing runs; network and namespaces are released.
    Stopped,
    /// The shim or the VM died, or an undo failed. Not ready; can be stopped and removed.
    Broken,
    /// RemovePodSandbox is at work.
    Removing,
}

/// State of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerState {
    /// CreateContainer is at work; not listed yet.
    Creating,
    /// Its process waits to be started.
    Created,
    /// StartContainer is at work.
    Starting,
    /// Its process runs.
    Running,
    /// StopContainer is at work.
    Stopping,
    /// Its process has ended; exit code, reason and time are recorded.
    Exited,
    /// RemoveContainer is at work.
    Removing,
    /// It no longer runs, and how it ended is not known.
    Unknown,
}

impl ContainerState {
    /// Its process has ended, as far as is known.
    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(self, Self::Exited | Self::Unknown)
    }
}

/// What is asked of a pod or of one of its containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// StopPodSandbox.
    StopPod,
    /// RemovePodSandbox.
    RemovePod,
    /// CreateContainer.
    CreateContainer,
    /// StartContainer.
    StartContainer,
    /// StopContainer.
    StopContainer,
    /// RemoveContainer.
    RemoveContainer,
    /// UpdateContainerResources.
    UpdateContainer,
    /// ExecSync, Exec, Attach, ReopenContainerLog: whatever needs a running process.
    UseContainer,
}

/// What becomes of an admitted request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Its work begins.
    Begin,
    /// The same is at work already: its result is shared.
    Join,
    /// It is so already.
    Done,
}

/// Why a request was not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// The pod is in no state for it.
    #[error("the pod sandbox is {0:?}, not Ready")]
    PodNotReady(PodState),
    /// The container is in no state for it.
    #[error("the container is {0:?}, which does not allow this request")]
    ContainerState(ContainerState),
    /// The container does not run.
    #[error("the container is {0:?}, not Running")]
    NotRunning(ContainerState),
    /// The container is not there for the caller (being created, or being removed).
    #[error("there is no such container")]
    NoContainer,
}

/// Decides about a request. `container` is the state of the container it names, where it names one.
///
/// # Errors
/// The [`Denial`].
pub fn admit(
    pod: PodState,
    container: Option<ContainerState>,
    request: Request,
) -> Result<Admission, Denial> {
    use ContainerState as C;
    use PodState as P;
    match request {
        Request::StopPod => Ok(match pod {
            // Stopping overtakes everything, also the pod's own creation.
            P::Creating | P::Ready | P::Broken => Admission::Begin,
            P::Stopping => Admission::Join,
            P::Stopped | P::Removing => Admission::Done,
        }),
        Request::RemovePod => Ok(match pod {
            P::Removing => Admission::Join,
            _ => Admission::Begin,
        }),
        Request::CreateContainer => match pod {
            P::Ready => Ok(Admission::Begin),
            other => Err(Denial::PodNotReady(other)),
        },
        Request::StartContainer => match (pod, container.ok_or(Denial::NoContainer)?) {
            (_, C::Creating | C::Removing) => Err(Denial::NoContainer),
            (P::Ready, C::Created) => Ok(Admission::Begin),
            (P::Ready, C::Starting) => Ok(Admission::Join),
            (P::Ready, C::Running) => Ok(Admission::Done),
            (P::Ready, other) => Err(Denial::ContainerState(other)),
            (other, _) => Err(Denial::PodNotReady(other)),
        },
        Request::StopContainer => match container.ok_or(Denial::NoContainer)? {
            C::Creating => Err(Denial::NoContainer),
            C::Created | C::Starting | C::Running => Ok(Admission::Begin),
            C::Stopping => Ok(Admission::Join),
            C::Exited | C::Unknown | C::Removing => Ok(Admission::Done),
        },
        Request::RemoveContainer => match container.ok_or(Denial::NoContainer)? {
            C::Creating => Err(Denial::NoContainer),
            C::Removing => Ok(Admission::Join),
            _ => Ok(Admission::Begin),
        },
        Request::UpdateContainer => match container.ok_or(Denial::NoContainer)? {
            C::Creating | C::Removing => Err(Denial::NoContainer),
            C::Created | C::Starting | C::Running => Ok(Admission::Begin),
            other => Err(Denial::ContainerState(other)),
        },
        Request::UseContainer => match container.ok_or(Denial::NoContainer)? {
            C::Creating | C::Removing => Err(Denial::NoContainer),
            C::Running | C::Stopping => Ok(Admission::Begin),
            other => Err(Denial::NotRunning(other)),
        },
    }
}

/// The state after the container's process has ended; `known` says whether how it ended is known.
#[must_use]
pub fn after_exit(state: ContainerState, known: bool) -> ContainerState {
    match state {
        ContainerState::Removing => ContainerState::Removing,
        // A process ends once; what was recorded first stays.
        ContainerState::Exited => ContainerState::Exited,
        _ if known => ContainerState::Exited,
        _ => ContainerState::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pods() -> impl Strategy<Value = PodState> {
        use PodState::*;
        prop::sample::select(vec![Creating, Ready, Stopping, Stopped, Broken, Removing])
    }

    fn containers() -> impl Strategy<Value = ContainerState> {
        use ContainerState::*;
        prop::sample::select(vec![
            Creating, Created, Starting, Running, Stopping, Exited, Removing, Unknown,
        ])
    }

    fn requests() -> impl Strategy<Value = Request> {
        use Request::*;
        prop::sample::select(vec![
            StopPod,
            RemovePod,
            CreateContainer,
            StartContainer,
            StopContainer,
            RemoveContainer,
            UpdateContainer,
            UseContainer,
        ])
    }

    /// The state that a request's work moves to when it begins.
    fn begun(
        pod: PodState,
        container: Option<ContainerState>,
        request: Request,
    ) -> (PodState, Option<ContainerState>) {
        match request {
            Request::StopPod => (PodState::Stopping, container),
            Request::RemovePod => (PodState::Removing, container),
            Request::StartContainer => (pod, Some(ContainerState::Starting)),
            Request::StopContainer => (pod, Some(ContainerState::Stopping)),
            Request::RemoveContainer => (pod, Some(ContainerState::Removing)),
            _ => (pod, container),
        }
    }

    proptest! {
        #[test]
        fn teardown_is_never_denied_for_what_is_listed(pod in pods(), container in containers()) {
            prop_assert!(admit(pod, None, Request::StopPod).is_ok());
            prop_assert!(admit(pod, None, Request::RemovePod).is_ok());
            if container != ContainerState::Creating {
                prop_assert!(admit(pod, Some(container), Request::StopContainer).is_ok());
                prop_assert!(admit(pod, Some(container), Request::RemoveContainer).is_ok());
            }
        }

        #[test]
        fn nothing_starts_outside_a_ready_pod(pod in pods(), container in containers()) {
            if pod != PodState::Ready {
                prop_assert!(admit(pod, None, Request::CreateContainer).is_err());
                prop_assert!(admit(pod, Some(container), Request::StartContainer).is_err());
            }
        }

        #[test]
        fn what_has_ended_is_never_started_or_used(pod in pods(), container in containers()) {
            if container.is_over() {
                for request in [Request::StartContainer, Request::UseContainer, Request::UpdateContainer] {
                    prop_assert!(admit(pod, Some(container), request).is_err());
                }
                prop_assert_eq!(admit(pod, Some(container), Request::StopContainer), Ok(Admission::Done));
            }
        }

        /// A retry of what has begun never begins a second time.
        #[test]
        fn a_retried_request_joins(pod in pods(), container in prop::option::of(containers()), request in requests()) {
            let exclusive = !matches!(
                request,
                Request::CreateContainer | Request::UpdateContainer | Request::UseContainer
            );
            if exclusive && admit(pod, container, request) == Ok(Admission::Begin) {
                let (pod, container) = begun(pod, container, request);
                prop_assert_eq!(admit(pod, container, request), Ok(Admission::Join));
            }
        }

        /// Stop overtakes Start: whatever is at work on a container, its stop and the pod's stop may begin.
        #[test]
        fn stop_overtakes_start(request in requests()) {
            let (pod, container) = begun(PodState::Ready, Some(ContainerState::Created), request);
            if request == Request::StartContainer {
                prop_assert_eq!(admit(pod, container, Request::StopContainer), Ok(Admission::Begin));
                prop_assert_eq!(admit(pod, container, Request::StopPod), Ok(Admission::Begin));
            }
        }

        #[test]
        fn an_exit_is_final(state in containers(), known in any::<bool>(), again in any::<bool>()) {
            let once = after_exit(state, known);
            prop_assert!(once.is_over() || once == ContainerState::Removing);
            if once == ContainerState::Exited {
                prop_assert_eq!(after_exit(once, again), ContainerState::Exited);
            }
        }

        #[test]
        fn a_request_on_a_container_needs_one(pod in pods(), request in requests()) {
            let about_pod = matches!(request, Request::StopPod | Request::RemovePod | Request::CreateContainer);
            if !about_pod && pod == PodState::Ready {
                prop_assert_eq!(admit(pod, None, request), Err(Denial::NoContainer));
            }
        }
    }
}
