//! The owner's changes of records, what it tells of them, and its end.

use std::sync::Arc;

use catamaran_sandbox::id::Id;

use super::{Owner, Reply, answer};
use crate::cri::api::ContainerEventType;
use crate::cri::convert::event;
use crate::error::{Error, Result};
use crate::pods::record::{ContainerRecord, PodRecord, PodView};
use crate::store::{Table, Written};

impl Owner {
    pub(super) fn change_pod(&mut self, change: impl FnOnce(&mut PodRecord)) -> Written {
        change(Arc::make_mut(&mut self.pod));
        self.publish();
        self.node.store.put(Table::Pods, self.pod.id.as_str(), &*self.pod)
    }

    pub(super) fn change_container(&mut self, id: &Id, change: impl FnOnce(&mut ContainerRecord)) -> Written {
        if let Some(container) = self.containers.get_mut(id) {
            change(Arc::make_mut(container));
        }
        self.publish_container(id)
    }

    pub(super) fn publish_container(&self, id: &Id) -> Written {
        self.publish();
        match self.containers.get(id) {
            Some(container) => self.node.store.put(Table::Containers, id.as_str(), &**container),
            None => Written::already(),
        }
    }

    pub(super) fn publish(&self) {
        let view = PodView {
            pod: self.pod.clone(),
            containers: self.containers.clone(),
            shim: self.shim.clone(),
        };
        self.view.send_replace(Arc::new(view));
    }

    /// Forgets a container that is gone; its record's removal is queued.
    pub(super) fn drop_container(&mut self, id: &Id) -> Written {
        self.containers.remove(id);
        self.unclaimed.retain(|unclaimed| unclaimed != id);
        self.early_exits.remove(id);
        self.updates.remove(id);
        self.publish();
        self.node.nri.forget(id.as_str());
        self.node.store.remove(Table::Containers, id.as_str())
    }

    /// Plugins are told that a container has ended.
    pub(super) fn tell_end(&self, id: &Id) {
        let (node, pod) = (self.node.clone(), self.pod.clone());
        if let Some(container) = self.containers.get(id).cloned() {
            let pair = move || crate::nri::pair(&node, &pod, &container);
            self.node.nri.container_ended(id.as_str(), pair);
        }
    }

    pub(super) fn send_event(&self, id: &Id, kind: ContainerEventType) {
        let view = self.view.borrow().clone();
        self.node.events.send(|| event(&view, id, kind));
    }

    /// A creation that was undone: the record goes, then the name, then those who wait are told. Whoever
    /// asked for the pod's end has it.
    pub(super) async fn forget(mut self, waiting: Vec<Reply<Id>>, error: Arc<Error>) {
        self.forget_record().await;
        answer(waiting, &Err(error));
    }

    /// As [`Owner::forget`], of a creation that a former daemon had begun. Those who wait are given no answer: to
    /// them this attempt never was, and they begin anew.
    pub(super) async fn undone(mut self) {
        self.forget_record().await;
    }

    async fn forget_record(&mut self) {
        if let Err(error) = self
            .node
            .store
            .remove(Table::Pods, self.pod.id.as_str())
            .durable()
            .await
        {
            // The record would only be undone once more at the next start.
            tracing::warn!(pod = %self.pod.id, %error, "the record of an undone pod stays");
        }
        self.pods.forget(&self.pod.id);
        self.node.nri.forget(self.pod.id.as_str());
        answer(self.at_work.stop.take().unwrap_or_default(), &Ok(()));
        answer(std::mem::take(&mut self.at_work.removal_wanted), &Ok(()));
    }

    /// A removal that is complete: the records go, then the names, then the answer.
    pub(super) async fn gone(mut self) {
        let mut written: Vec<Written> = self
            .containers
            .keys()
            .map(|id| self.node.store.remove(Table::Containers, id.as_str()))
            .collect();
        written.push(self.node.store.remove(Table::Pods, self.pod.id.as_str()));
        for write in written {
            write.attempted().await;
        }
        for id in self.containers.keys().chain([&self.pod.id]) {
            self.send_event(id, ContainerEventType::ContainerDeletedEvent);
        }
        self.pods.forget(&self.pod.id);
        for id in self.containers.keys().chain([&self.pod.id]) {
            self.node.nri.forget(id.as_str());
        }
        let mut waiting = self.at_work.removal.take().unwrap_or_default();
        waiting.append(&mut self.at_work.removal_wanted);
        answer(waiting, &Ok(()));
    }
}

/// As [`answer`], once the record is durable.
pub(super) fn answer_when<T: Clone + Send + 'static>(written: Written, replies: Vec<Reply<T>>, value: T) {
    tokio::spawn(async move {
        let result: Result<T, Arc<Error>> = written
            .durable()
            .await
            .map(|()| value)
            .map_err(|error| Arc::new(error.into()));
        answer(replies, &result);
    });
}

/// As [`answer_when`], for teardown: what is gone is gone, also where that cannot be recorded yet.
pub(super) fn answer_ended(written: Written, replies: Vec<Reply<()>>) {
    tokio::spawn(async move {
        written.attempted().await;
        answer(replies, &Ok(()));
    });
}
