//! UpdatePodSandboxResources: the pod's resources after an in-place resize.
//!
//! The kubelet tells them after it has resized its own cgroup of the pod; what remains to be done is to record
//! them, and to limit the cgroup where the daemon made it, for a pod without a `cgroup_parent` (RunPodSandbox limits
//! it in the same way). A VM's size does not change with them, so growing beyond it is refused; the cgroup of its
//! VMM is left alone: a limit there would kill the whole VM.

use std::sync::Arc;

use catamaran_sandbox::pod_spec::{RuntimeSpec, VmSpec};

use super::record::PodRecord;
use super::teardown::blocking;
use crate::config::HandlerType;
use crate::cri::api::{LinuxContainerResources, LinuxPodSandboxConfig};
use crate::error::{Error, Result, chain};
use crate::node::Node;

/// The kernel's period of a CPU quota, in microseconds, where none is given.
const DEFAULT_PERIOD: i64 = 100_000;

/// What the request has, verified.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct PodResources {
    /// What the pod takes besides its containers.
    pub(super) overhead: Option<LinuxContainerResources>,
    /// The sum of its containers.
    pub(super) resources: Option<LinuxContainerResources>,
}

impl PodResources {
    /// Those that RunPodSandbox has.
    pub(super) fn of(linux: Option<&LinuxPodSandboxConfig>) -> Self {
        let linux = linux.cloned().unwrap_or_default();
        Self {
            overhead: linux.overhead,
            resources: linux.resources,
        }
    }
}

/// Checks the numbers of an update.
///
/// # Errors
/// [`Error::InvalidArgument`] naming the field.
pub(super) fn verify(
    overhead: Option<LinuxContainerResources>,
    resources: Option<LinuxContainerResources>,
) -> Result<PodResources> {
    let wanted = PodResources { overhead, resources };
    verify_numbers("", &wanted)?;
    Ok(wanted)
}

/// Checks the numbers of a pod that is to be made.
///
/// # Errors
/// [`Error::InvalidArgument`] naming the field.
pub(super) fn verify_linux(linux: Option<&LinuxPodSandboxConfig>) -> Result<()> {
    verify_numbers("config.linux.", &PodResources::of(linux))
}

fn verify_numbers(prefix: &str, wanted: &PodResources) -> Result<()> {
    for (name, given) in [("overhead", &wanted.overhead), ("resources", &wanted.resources)] {
        let Some(given) = given else { continue };
        // -1 is no limit, as the kubelet has it for a pod without a CPU quota.
        for (field, value, least) in [
            ("cpu_period", given.cpu_period, 0),
            ("cpu_quota", given.cpu_quota, -1),
            ("cpu_shares", given.cpu_shares, 0),
            ("memory_limit_in_bytes", given.memory_limit_in_bytes, -1),
            ("memory_swap_limit_in_bytes", given.memory_swap_limit_in_bytes, -1),
            ("oom_score_adj", given.oom_score_adj, -1000),
        ] {
            if value < least {
                return Err(Error::invalid(
                    format!("{prefix}{name}.{field}"),
                    format!("{value} is less than {least}"),
                ));
            }
        }
    }
    Ok(())
}

/// Limits the pod's cgroup where it is the daemon's.
pub(super) async fn run(
    node: &Node,
    pod: Arc<PodRecord>,
    wanted: Box<PodResources>,
) -> Result<Box<PodResources>> {
    let request = || catamaran_nri::api::UpdatePodSandboxRequest {
        pod: Some(crate::nri::pod(&pod)),
        overhead_linux_resources: wanted.overhead.as_ref().map(crate::nri::resources),
        linux_resources: wanted.resources.as_ref().map(crate::nri::resources),
    };
    if let (RuntimeSpec::Vm(vm), Some(resources)) = (&pod.spec.runtime, &wanted.resources) {
        let before = PodResources::of(pod.config.linux.as_ref()).resources;
        fits_vm(vm, "resources", &before.unwrap_or_default(), resources)?;
    }
    node.nri.update_pod(request).await?;
    limit_cgroup(&pod, &wanted).await?;
    let updated = || {
        let mut updated = PodRecord::clone(&pod);
        record(&mut updated, PodResources::clone(&wanted));
        crate::nri::pod(&updated)
    };
    node.nri.pod_updated(updated).await;
    Ok(wanted)
}

/// Limits the pod's cgroup where it is the daemon's, and not a VMM's.
pub(super) async fn limit_cgroup(pod: &PodRecord, wanted: &PodResources) -> Result<()> {
    let limits = limits(wanted);
    if !pod.owns_cgroup
        || super::handler_kind(pod) != HandlerType::Oci
        || limits == catamaran_cgroups::Resources::default()
    {
        return Ok(());
    }
    let path = pod.cgroup_parent.clone();
    blocking(move || {
        catamaran_cgroups::set(&path, &limits).map_err(|e| Error::Cgroup {
            problem: chain(&e),
            path,
        })
    })
    .await
}

/// A VM has what it was started with: limits that grow beyond that would be promised and not given.
///
/// # Errors
/// [`Error::FailedPrecondition`] naming the field.
pub(super) fn fits_vm(
    vm: &VmSpec,
    field: &str,
    before: &LinuxContainerResources,
    wanted: &LinuxContainerResources,
) -> Result<()> {
    let refused = |name: &str, text: String| {
        Err(Error::FailedPrecondition(format!(
            "{field}.{name}: {text}, and a VM does not grow; make the pod anew with these limits"
        )))
    };
    let grows = |new: i64, old: i64| old <= 0 || new > old;
    let memory = wanted.memory_limit_in_bytes;
    if memory > i64::from(vm.memory_mib) << 20 && grows(memory, before.memory_limit_in_bytes) {
        let text = format!("{memory} is more than the {} MiB of the pod's VM", vm.memory_mib);
        return refused("memory_limit_in_bytes", text);
    }
    let cpus = milli_cpus(wanted);
    if cpus > i64::from(vm.cpus) * 1000 && grows(cpus, milli_cpus(before)) {
        let text = format!(
            "{} CPUs are more than the {} of the pod's VM",
            cpus as f64 / 1000.0,
            vm.cpus
        );
        return refused("cpu_quota", text);
    }
    Ok(())
}

/// Thousandths of a CPU; 0 where there is no limit.
fn milli_cpus(resources: &LinuxContainerResources) -> i64 {
    let period = match resources.cpu_period {
        period if period > 0 => period,
        _ => DEFAULT_PERIOD,
    };
    resources.cpu_quota.max(0).saturating_mul(1000) / period
}

/// Writes what was applied into the record, where RunPodSandbox has the same.
pub(super) fn record(pod: &mut PodRecord, wanted: PodResources) {
    let linux = pod
        .config
        .linux
        .get_or_insert_with(LinuxPodSandboxConfig::default);
    linux.overhead = wanted.overhead.or(linux.overhead.take());
    linux.resources = wanted.resources.or(linux.resources.take());
}

/// Limits of the whole pod: its containers and the overhead. A limit that the containers do not have is none of
/// the pod's either.
fn limits(wanted: &PodResources) -> catamaran_cgroups::Resources {
    let resources = wanted.resources.clone().unwrap_or_default();
    let overhead = wanted.overhead.clone().unwrap_or_default();
    let sum = |own: i64, more: i64| match own {
        0 => None,
        own if own < 0 => Some(-1),
        own => Some(own.saturating_add(more.max(0))),
    };
    let unsigned = |value: Option<i64>| value.and_then(|value| u64::try_from(value).ok());
    // The overhead's quota may be of another period.
    let more_quota = match (resources.cpu_period, overhead.cpu_period) {
        (period, other) if period > 0 && other > 0 && period != other => {
            let scaled = i128::from(overhead.cpu_quota) * i128::from(period) / i128::from(other);
            i64::try_from(scaled).unwrap_or(i64::MAX)
        }
        _ => overhead.cpu_quota,
    };
    catamaran_cgroups::Resources {
        memory_bytes: sum(resources.memory_limit_in_bytes, overhead.memory_limit_in_bytes),
        memory_swap_bytes: sum(
            resources.memory_swap_limit_in_bytes,
            overhead.memory_swap_limit_in_bytes,
        ),
        cpu_shares: unsigned(sum(resources.cpu_shares, overhead.cpu_shares)),
        cpu_quota_us: sum(resources.cpu_quota, more_quota),
        cpu_period_us: unsigned(Some(resources.cpu_period)).filter(|period| *period > 0),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(quota: i64, period: i64) -> LinuxContainerResources {
        LinuxContainerResources {
            cpu_quota: quota,
            cpu_period: period,
            ..Default::default()
        }
    }

    #[test]
    fn a_negative_number_is_refused_by_its_field() {
        let refused = |overhead, resources| verify(Some(overhead), Some(resources)).unwrap_err().to_string();
        let text = refused(cpu(0, 0), cpu(-2, 0));
        assert_eq!(text, "resources.cpu_quota: -2 is less than -1");
        let text = refused(cpu(0, -5), cpu(0, 0));
        assert_eq!(text, "overhead.cpu_period: -5 is less than 0");
        let shares = LinuxContainerResources {
            cpu_shares: -1,
            ..Default::default()
        };
        assert!(refused(cpu(0, 0), shares).starts_with("resources.cpu_shares"));
        verify(None, Some(cpu(-1, 100_000))).unwrap();
    }

    #[test]
    fn a_vm_does_not_grow() {
        let vm = VmSpec {
            vmm: "/q".into(),
            virtiofsd: "/v".into(),
            kernel: "/k".into(),
            initramfs: "/i".into(),
            kernel_args: String::new(),
            cpus: 2,
            memory_mib: 384,
            acceleration: catamaran_sandbox::pod_spec::Acceleration::Tcg,
            boot_timeout_ms: 1,
        };
        let memory = |mib: i64| LinuxContainerResources {
            memory_limit_in_bytes: mib << 20,
            ..Default::default()
        };
        let check = |before, wanted| fits_vm(&vm, "linux", &before, &wanted).map_err(|e| e.to_string());
        for (before, wanted, field) in [
            (memory(128), memory(385), "linux.memory_limit_in_bytes: "),
            (memory(0), memory(385), "linux.memory_limit_in_bytes: "),
            (
                cpu(100_000, 100_000),
                cpu(250_000, 100_000),
                "linux.cpu_quota: 2.5 CPUs",
            ),
            (cpu(0, 0), cpu(250_000, 0), "linux.cpu_quota: "),
        ] {
            let error = check(before, wanted).unwrap_err();
            assert!(
                error.starts_with(field) && error.contains("make the pod anew"),
                "{error}"
            );
        }
        for (before, wanted) in [
            (memory(128), memory(384)),
            // What was accepted before, and less.
            (memory(512), memory(512)),
            (memory(512), memory(400)),
            (memory(128), memory(0)),
            (cpu(0, 0), cpu(-1, 100_000)),
            (cpu(100_000, 100_000), cpu(200_000, 100_000)),
            (cpu(400_000, 100_000), cpu(400_000, 100_000)),
        ] {
            check(before, wanted).unwrap();
        }
    }

    #[test]
    fn a_new_pods_numbers_are_named_by_their_place() {
        let linux = LinuxPodSandboxConfig {
            overhead: Some(cpu(-5, 0)),
            ..Default::default()
        };
        let error = verify_linux(Some(&linux)).unwrap_err().to_string();
        assert_eq!(error, "config.linux.overhead.cpu_quota: -5 is less than -1");
        verify_linux(None).unwrap();
    }

    #[test]
    fn the_pods_limits_are_those_of_containers_and_overhead() {
        let wanted = PodResources {
            resources: Some(LinuxContainerResources {
                memory_limit_in_bytes: 100,
                cpu_shares: 10,
                ..cpu(50_000, 100_000)
            }),
            overhead: Some(LinuxContainerResources {
                memory_limit_in_bytes: 20,
                ..cpu(10_000, 50_000)
            }),
        };
        let both = limits(&wanted);
        assert_eq!(both.memory_bytes, Some(120));
        assert_eq!(both.cpu_quota_us, Some(70_000));
        assert_eq!(both.cpu_period_us, Some(100_000));
        assert_eq!((both.cpu_shares, both.memory_swap_bytes), (Some(10), None));
        let unlimited = limits(&PodResources {
            resources: Some(cpu(-1, 100_000)),
            ..wanted
        });
        assert_eq!(unlimited.cpu_quota_us, Some(-1));
        // Overhead alone is no limit of the pod.
        assert_eq!(unlimited.memory_bytes, None);
    }
}
