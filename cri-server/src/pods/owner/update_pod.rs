//! The owner's part of UpdatePodSandboxResources.

use std::sync::Arc;

use super::records::answer_when;
use super::{Done, Owner, Reply, answer};
use crate::error::{Error, Result};
use crate::pods::state::{Denial, PodState};
use crate::pods::update_sandbox::{self, PodResources};

impl Owner {
    pub(super) fn update_pod(&mut self, wanted: Box<PodResources>, reply: Reply<()>) {
        if self.pod.state != PodState::Ready {
            let denied = Error::Denied {
                what: "pod sandbox",
                id: self.pod.id.to_string(),
                denial: Denial::PodNotReady(self.pod.state),
            };
            return answer(vec![reply], &Err(Arc::new(denied)));
        }
        let (node, pod) = (self.node.clone(), self.pod.clone());
        self.begin(async move { Done::PodUpdated(update_sandbox::run(&node, pod, wanted).await, reply) });
    }

    pub(super) fn pod_updated(&mut self, result: Result<Box<PodResources>>, reply: Reply<()>) {
        match result {
            Ok(applied) => {
                let written = self.change_pod(|pod| update_sandbox::record(pod, *applied));
                answer_when(written, vec![reply], ());
            }
            Err(error) => answer(vec![reply], &Err(Arc::new(error))),
        }
    }
}
