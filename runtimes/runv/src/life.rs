//! How a VM ends. A stop ends it in order; a VM that has lost what it cannot be without, its connection to the agent
//! or its shared files, is ended by force rather than left to look healthy, and the reason is kept.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::cgroup::Cgroup;
use crate::vmm::Vmm;

/// What a VM depends on may also end because the VM does: then that is seen within this.
const SAME_END: Duration = Duration::from_secs(1);

/// The life of one VM.
pub(crate) struct Life {
    vmm: Arc<dyn Vmm>,
    /// Of the VMM and virtiofsd.
    cgroup: Cgroup,
    /// Why the shim ends it, if it does.
    reason: OnceLock<String>,
}

impl Life {
    pub(crate) fn new(vmm: Arc<dyn Vmm>, cgroup: Cgroup) -> Arc<Self> {
        Arc::new(Self {
            vmm,
            cgroup,
            reason: OnceLock::new(),
        })
    }

    /// What ends from now on ends because of the stop.
    pub(crate) fn stopping(&self) {
        let _ = self.reason.set("the pod is stopped".to_owned());
    }

    /// Ends the VM by force, unless it is being ended already.
    pub(crate) fn end(&self, reason: String) {
        if self.reason.set(reason.clone()).is_ok() {
            tracing::warn!(reason, "the VM is killed");
            self.vmm.kill();
        }
    }

    /// When `lost` resolves, with the reason, the VM ends too.
    pub(crate) fn depend_on(self: &Arc<Self>, lost: impl Future<Output = String> + Send + 'static) {
        let life = Arc::clone(self);
        tokio::spawn(async move {
            let reason = lost.await;
            if tokio::time::timeout(SAME_END, life.vmm.ended()).await.is_err() {
                life.end(reason);
            }
        });
    }

    /// Answers when the VM has ended, with the reason.
    pub(crate) async fn ended(&self) -> String {
        let how = self.vmm.ended().await;
        let memory = if self.out_of_memory() {
            "; the kernel killed for memory: the pod's memory limit is too low for its VM (see the RuntimeClass's \
             overhead), or the node had none left"
        } else {
            ""
        };
        match self.reason.get() {
            Some(reason) => format!("{reason}: the VM was ended ({how}){memory}"),
            None => format!("the VM ended ({how}){memory}"),
        }
    }

    /// Whether the kernel has killed the VMM or virtiofsd for memory.
    pub(crate) fn out_of_memory(&self) -> bool {
        self.cgroup.oom_kills() > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::{Nic, SharedFs, VmmError};
    use async_trait::async_trait;
    use tokio::sync::watch;

    struct Fake(watch::Sender<bool>);

    #[async_trait]
    impl Vmm for Fake {
        fn pid(&self) -> u32 {
            1
        }
        fn agent_port_opened(&self) -> bool {
            true
        }
        async fn plug_nic(&self, _: Nic) -> Result<(), VmmError> {
            Err(VmmError::NoPort(0))
        }
        async fn plug_shared_fs(&self, _: SharedFs) -> Result<(), VmmError> {
            Err(VmmError::NoPort(0))
        }
        async fn ended(&self) -> String {
            self.0.subscribe().wait_for(|ended| *ended).await.unwrap();
            "signal 9".to_owned()
        }
        fn kill(&self) {
            self.0.send_replace(true);
        }
    }

    fn fake() -> (Arc<Fake>, Arc<Life>) {
        let vmm = Arc::new(Fake(watch::Sender::new(false)));
        let cgroup = Cgroup::new("absent", false, "of-a-test").unwrap();
        (Arc::clone(&vmm), Life::new(vmm, cgroup))
    }

    #[tokio::test(start_paused = true)]
    async fn a_vm_that_lost_what_it_needs_is_killed_with_the_reason() {
        let (_vmm, life) = fake();
        life.depend_on(async { "virtiofsd ended".to_owned() });
        assert_eq!(life.ended().await, "virtiofsd ended: the VM was ended (signal 9)");
        life.end("later".to_owned());
        assert!(life.ended().await.starts_with("virtiofsd ended"));
    }

    #[tokio::test(start_paused = true)]
    async fn what_goes_with_the_vm_is_not_its_reason() {
        let (vmm, life) = fake();
        life.depend_on(async { "virtiofsd ended".to_owned() });
        tokio::task::yield_now().await;
        vmm.kill();
        assert_eq!(life.ended().await, "the VM ended (signal 9)");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_is_left_to_end_the_vm_in_order() {
        let (vmm, life) = fake();
        life.stopping();
        life.depend_on(async { "virtiofsd ended".to_owned() });
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert!(!*vmm.0.borrow());
    }
}
