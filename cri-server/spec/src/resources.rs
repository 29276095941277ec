//! Resource limits: CRI LinuxContainerResources to the OCI runtime's, which writes them to cgroup v1 or v2.

use catamaran_cri_api::v1::{ContainerConfig, LinuxContainerResources};
use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources};

use crate::error::{Result, SpecError};
use crate::host::{CgroupVersion, HostFeatures};

/// Bounds of the kernel's CFS bandwidth controller, microseconds.
const CPU_PERIOD: std::ops::RangeInclusive<i64> = 1_000..=1_000_000;
const MIN_CPU_QUOTA: i64 = 1_000;

/// `resources` with what UpdateContainerResources asks for; a zero or empty field leaves that limit as it is.
/// For a container of a VM pod `host` is [`HostFeatures::guest`].
///
/// # Errors
/// A value out of range, or a limit for which the kernel has no controller.
pub fn apply_resources(
    resources: &LinuxResources,
    wanted: &LinuxContainerResources,
    host: &HostFeatures,
) -> Result<LinuxResources> {
    apply("linux", resources, wanted, host)
}

/// `prefix`: the path of `wanted` in its request.
pub(crate) fn apply(
    prefix: &str,
    resources: &LinuxResources,
    wanted: &LinuxContainerResources,
    host: &HostFeatures,
) -> Result<LinuxResources> {
    let mut result = resources.clone();
    result.set_cpu(Some(cpu(
        prefix,
        resources.cpu().clone().unwrap_or_default(),
        wanted,
    )?));
    result.set_memory(Some(memory(
        prefix,
        resources.memory().unwrap_or_default(),
        wanted,
        host,
    )?));
    hugepages(prefix, &mut result, wanted, host)?;
    if !wanted.unified.is_empty() {
        let field = format!("{prefix}.unified");
        if host.cgroup == CgroupVersion::V1 {
            return Err(SpecError::precondition(
                field,
                "the node's controllers are on cgroup v1",
            ));
        }
        let unified = result.unified_mut().get_or_insert_default();
        for (key, value) in &wanted.unified {
            let file = key.contains('.') && !key.contains(['/', '\0']) && !key.starts_with('.');
            // These would take the container out of the shim's hands.
            if !file || key.starts_with("cgroup.") || value.contains('\0') {
                return Err(SpecError::invalid(
                    field,
                    format!("{key:?} is not a controller's file"),
                ));
            }
            unified.insert(key.clone(), value.clone());
        }
    }
    Ok(result)
}

fn cpu(prefix: &str, mut cpu: LinuxCpu, wanted: &LinuxContainerResources) -> Result<LinuxCpu> {
    if wanted.cpu_period != 0 {
        let period = u64::try_from(wanted.cpu_period)
            .ok()
            .filter(|_| CPU_PERIOD.contains(&wanted.cpu_period));
        let period = period.ok_or_else(|| {
            SpecError::invalid(
                format!("{prefix}.cpu_period"),
                "not between 1000 and 1000000 microseconds",
            )
        })?;
        cpu.set_period(Some(period));
    }
    match wanted.cpu_quota {
        0 => {}
        -1 | MIN_CPU_QUOTA.. => {
            cpu.set_quota(Some(wanted.cpu_quota));
        }
        _ => {
            let reason = "neither -1 (no limit) nor at least 1000 microseconds";
            return Err(SpecError::invalid(format!("{prefix}.cpu_quota"), reason));
        }
    }
    if wanted.cpu_shares != 0 {
        let shares = u64::try_from(wanted.cpu_shares)
            .map_err(|_| SpecError::invalid(format!("{prefix}.cpu_shares"), "negative"))?;
        cpu.set_shares(Some(shares));
    }
    for (list, field) in [
        (&wanted.cpuset_cpus, "cpuset_cpus"),
        (&wanted.cpuset_mems, "cpuset_mems"),
    ] {
        if !list.is_empty() && !is_list(list) {
            let reason = format!("{list:?} is not a list like 0-2,7");
            return Err(SpecError::invalid(format!("{prefix}.{field}"), reason));
        }
    }
    if !wanted.cpuset_cpus.is_empty() {
        cpu.set_cpus(Some(wanted.cpuset_cpus.clone()));
    }
    if !wanted.cpuset_mems.is_empty() {
        cpu.set_mems(Some(wanted.cpuset_mems.clone()));
    }
    Ok(cpu)
}

/// The "List format" of cpuset(7).
fn is_list(text: &str) -> bool {
    text.trim_end().split(',').all(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) else {
            return false;
        };
        first <= last && range.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-')
    })
}

fn memory(
    prefix: &str,
    mut memory: LinuxMemory,
    wanted: &LinuxContainerResources,
    host: &HostFeatures,
) -> Result<LinuxMemory> {
    let (limit, swap) = (wanted.memory_limit_in_bytes, wanted.memory_swap_limit_in_bytes);
    for (value, field) in [
        (limit, "memory_limit_in_bytes"),
        (swap, "memory_swap_limit_in_bytes"),
    ] {
        if value < -1 {
            return Err(SpecError::invalid(
                format!("{prefix}.{field}"),
                "negative (no limit is -1 or 0)",
            ));
        }
    }
    if limit != 0 {
        memory.set_limit(Some(limit));
        // Memory and swap together: without a word on swap a container does not swap.
        if swap == 0 && host.swap {
            memory.set_swap(Some(limit));
        }
    }
    if swap != 0 {
        let field = || format!("{prefix}.memory_swap_limit_in_bytes");
        let memory_limit = memory.limit().unwrap_or(0);
        if swap > 0 && (memory_limit == -1 || swap < memory_limit) {
            let reason = "it counts memory and swap together and is less than the memory limit";
            return Err(SpecError::invalid(field(), reason));
        }
        if host.swap {
            memory.set_swap(Some(swap));
        } else if swap != limit && swap != -1 {
            return Err(SpecError::precondition(
                field(),
                "the node's kernel does not account swap (swapaccount=1)",
            ));
        }
    }
    Ok(memory)
}

/// The kubelet sends a limit of 0 for every page size of the node, also where there is no controller.
fn hugepages(
    prefix: &str,
    resources: &mut LinuxResources,
    wanted: &LinuxContainerResources,
    host: &HostFeatures,
) -> Result<()> {
    if wanted.hugepage_limits.is_empty() {
        return Ok(());
    }
    let mut limits = resources.hugepage_limits().clone().unwrap_or_default();
    for (index, wanted) in wanted.hugepage_limits.iter().enumerate() {
        let field = format!("{prefix}.hugepage_limits[{index}]");
        let digits = wanted.page_size.trim_end_matches(|c: char| !c.is_ascii_digit());
        let unit = &wanted.page_size[digits.len()..];
        if !matches!(unit, "KB" | "MB" | "GB") || digits.parse::<u32>().is_err() {
            return Err(SpecError::invalid(
                field,
                format!("{:?} is not a page size like 2MB", wanted.page_size),
            ));
        }
        if !host.hugetlb {
            if wanted.limit == 0 {
                continue;
            }
            return Err(SpecError::precondition(
                field,
                "the kernel has no hugetlb cgroup controller",
            ));
        }
        let mut limit = LinuxHugepageLimit::default();
        limit.set_page_size(wanted.page_size.clone());
        limit.set_limit(i64::try_from(wanted.limit).unwrap_or(i64::MAX));
        limits.retain(|known| known.page_size() != &wanted.page_size);
        limits.push(limit);
    }
    if !limits.is_empty() {
        resources.set_hugepage_limits(Some(limits));
    }
    Ok(())
}

/// 0 where nothing is asked for, as the daemon and its shims may be protected and must not pass that on. Raised
/// to the lowest that can be set where the daemon may not lower it (CAP_SYS_RESOURCE is missing): the container
/// then is a likelier victim than asked for, which beats not starting it.
pub(crate) fn oom_score_adj(container: &ContainerConfig, host: &HostFeatures) -> Result<Option<i32>> {
    let linux = container.linux.as_ref();
    let resources = linux.and_then(|linux| linux.resources.as_ref());
    match i32::try_from(resources.map_or(0, |resources| resources.oom_score_adj)) {
        Ok(wanted) if (-1000..=1000).contains(&wanted) => Ok(Some(host.settable_oom_score_adj(wanted))),
        _ => Err(SpecError::invalid(
            "linux.resources.oom_score_adj",
            "not between -1000 and 1000",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::SpecErrorKind::{self, FailedPrecondition, InvalidArgument};
    use catamaran_cri_api::v1::{HugepageLimit, LinuxContainerConfig};

    fn v1() -> HostFeatures {
        HostFeatures {
            cgroup: CgroupVersion::V1,
            swap: false,
            ..HostFeatures::guest("n")
        }
    }

    fn wanted(set: impl FnOnce(&mut LinuxContainerResources)) -> LinuxContainerResources {
        let mut wanted = LinuxContainerResources::default();
        set(&mut wanted);
        wanted
    }

    #[test]
    fn limits_and_updates() {
        let host = HostFeatures::guest("n");
        let first = wanted(|w| {
            w.cpu_period = 100_000;
            w.cpu_quota = 50_000;
            w.cpu_shares = 512;
            w.memory_limit_in_bytes = 64 << 20;
            w.cpuset_cpus = "0-1".into();
            w.unified.insert("memory.high".into(), "1000".into());
        });
        let resources = apply_resources(&LinuxResources::default(), &first, &host).expect("ok");
        let cpu = resources.cpu().clone().expect("cpu");
        assert_eq!(
            (cpu.period(), cpu.quota(), cpu.shares()),
            (Some(100_000), Some(50_000), Some(512))
        );
        assert_eq!(cpu.cpus().as_deref(), Some("0-1"));
        let memory = resources.memory().expect("memory");
        assert_eq!((memory.limit(), memory.swap()), (Some(64 << 20), Some(64 << 20)));

        let second = wanted(|w| w.cpu_quota = -1);
        let updated = apply_resources(&resources, &second, &host).expect("ok");
        let cpu = updated.cpu().clone().expect("cpu");
        assert_eq!(
            (cpu.period(), cpu.quota(), cpu.shares()),
            (Some(100_000), Some(-1), Some(512))
        );
        assert_eq!(updated.memory(), resources.memory());
        assert_eq!(
            updated
                .unified()
                .as_ref()
                .and_then(|u| u.get("memory.high").cloned()),
            Some("1000".into())
        );
    }

    #[test]
    fn swap() {
        let of = |limit: i64, swap: i64, host: &HostFeatures| {
            let wanted = wanted(|w| {
                w.memory_limit_in_bytes = limit;
                w.memory_swap_limit_in_bytes = swap;
            });
            let result = apply_resources(&LinuxResources::default(), &wanted, host);
            result
                .map(|r| r.memory().and_then(|m| m.swap()))
                .map_err(|e| e.kind)
        };
        let (with, without) = (HostFeatures::guest("n"), v1());
        assert_eq!(of(100, 0, &with), Ok(Some(100)));
        assert_eq!(of(100, 200, &with), Ok(Some(200)));
        assert_eq!(of(100, -1, &with), Ok(Some(-1)));
        assert_eq!(of(100, 50, &with), Err(InvalidArgument));
        assert_eq!(of(100, 0, &without), Ok(None));
        assert_eq!(of(100, 100, &without), Ok(None));
        assert_eq!(of(100, 200, &without), Err(FailedPrecondition));
    }

    #[test]
    fn hugepage_limits() {
        let limit = |size: &str, limit| HugepageLimit {
            page_size: size.into(),
            limit,
        };
        let of = |limits: Vec<HugepageLimit>, hugetlb| {
            let host = HostFeatures { hugetlb, ..v1() };
            apply_resources(
                &LinuxResources::default(),
                &wanted(|w| w.hugepage_limits = limits),
                &host,
            )
        };
        let resources = of(vec![limit("2MB", 4 << 20), limit("1GB", u64::MAX)], true).expect("ok");
        let limits = resources.hugepage_limits().clone().expect("limits");
        assert_eq!(
            (limits[0].page_size().as_str(), limits[0].limit()),
            ("2MB", 4 << 20)
        );
        assert_eq!(limits[1].limit(), i64::MAX);
        assert_eq!(
            of(vec![limit("2MB", 0)], false)
                .expect("none asked")
                .hugepage_limits(),
            &None
        );
        let error = of(vec![limit("2MB", 0), limit("1GB", 1)], false).expect_err("no controller");
        assert_eq!(
            (error.kind, error.field.as_str()),
            (FailedPrecondition, "linux.hugepage_limits[1]")
        );
        assert_eq!(
            of(vec![limit("2 MB", 0)], true).expect_err("size").kind,
            InvalidArgument
        );
    }

    #[test]
    fn refused() {
        type Set = fn(&mut LinuxContainerResources);
        let cases: [(&str, SpecErrorKind, Set); 9] = [
            ("linux.cpu_period", InvalidArgument, |w| w.cpu_period = 10),
            ("linux.cpu_quota", InvalidArgument, |w| w.cpu_quota = 999),
            ("linux.cpu_quota", InvalidArgument, |w| w.cpu_quota = -2),
            ("linux.cpu_shares", InvalidArgument, |w| w.cpu_shares = -1),
            ("linux.memory_limit_in_bytes", InvalidArgument, |w| {
                w.memory_limit_in_bytes = -5
            }),
            ("linux.cpuset_cpus", InvalidArgument, |w| {
                w.cpuset_cpus = "2-1".into()
            }),
            ("linux.cpuset_mems", InvalidArgument, |w| {
                w.cpuset_mems = "a".into()
            }),
            ("linux.cpuset_mems", InvalidArgument, |w| {
                w.cpuset_mems = "1,".into()
            }),
            ("linux.unified", FailedPrecondition, |w| {
                w.unified.insert("memory.high".into(), "1".into());
            }),
        ];
        for (field, kind, set) in cases {
            let error = apply_resources(&LinuxResources::default(), &wanted(set), &v1()).expect_err(field);
            assert_eq!((error.kind, error.field.as_str()), (kind, field));
        }
        for key in ["cgroup.procs", "../memory.max", "memory", ".x"] {
            let wanted = wanted(|w| {
                w.unified.insert(key.into(), "1".into());
            });
            let error = apply_resources(&LinuxResources::default(), &wanted, &HostFeatures::guest("n"));
            assert_eq!(error.expect_err(key).kind, InvalidArgument);
        }
    }

    #[test]
    fn oom_score() {
        let of = |adj: i64, lowest: Option<i32>| {
            let resources = wanted(|w| w.oom_score_adj = adj);
            let linux = LinuxContainerConfig {
                resources: Some(resources),
                ..Default::default()
            };
            let container = ContainerConfig {
                linux: Some(linux),
                ..Default::default()
            };
            oom_score_adj(
                &container,
                &HostFeatures {
                    min_oom_score_adj: lowest,
                    ..v1()
                },
            )
        };
        assert_eq!(of(-997, None), Ok(Some(-997)));
        assert_eq!(of(-997, Some(0)), Ok(Some(0)));
        assert_eq!(of(500, Some(0)), Ok(Some(500)));
        assert!(of(1001, None).is_err() && of(i64::MIN, None).is_err());
        assert_eq!(oom_score_adj(&ContainerConfig::default(), &v1()), Ok(Some(0)));
    }
}
