//! What a VM pod's shim is told: its size from the pod's limits, its kernel from the handler or the pod's
//! annotation, its acceleration from the probe.

use std::path::{Path, PathBuf};

use catamaran_sandbox::guest_image::{DEFAULT_LINK, GuestImage};
use catamaran_sandbox::pod_spec::{Acceleration, RuntimeSpec, VmSpec};

use crate::cri::api::PodSandboxConfig;
use crate::error::{Error, Result};
use crate::handlers::Handler;
use crate::node::Node;

/// A pod's annotation that names one of the guest kernels that its handler allows.
pub const KERNEL_ANNOTATION: &str = "catamaran.dev/kernel";
/// Guest memory besides the pod's limits: kernel, agent, page cache of the images.
const DEFAULT_MEMORY_MIB: u32 = 256;
const DEFAULT_CPUS: u32 = 1;
const BOOT_SECONDS_KVM: u64 = 20;
/// An emulated guest on a busy node.
const BOOT_SECONDS_TCG: u64 = 90;
/// Debian's places of the C and the Rust virtiofsd.
const VIRTIOFSD: [&str; 2] = ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"];

/// The VM of a pod.
///
/// # Errors
/// [`Error::InvalidArgument`] for a kernel that the handler does not allow, [`Error::FailedPrecondition`]
/// where artefacts or programs are missing.
pub(crate) async fn vm_spec(
    node: &Node,
    handler: &Handler,
    config: &PodSandboxConfig,
) -> Result<RuntimeSpec> {
    let kernel = chosen_kernel(handler, config)?;
    let (kernel, initramfs) = artefacts(&node.dirs.guests(), kernel)?;
    let acceleration = node.handlers.verdict().await.acceleration();
    let boot_seconds = handler.config.boot_timeout_seconds.unwrap_or(match acceleration {
        Acceleration::Kvm => BOOT_SECONDS_KVM,
        Acceleration::Tcg => BOOT_SECONDS_TCG,
    });
    let (cpus, memory_mib) = size(handler, config, host_cpus())?;
    Ok(RuntimeSpec::Vm(VmSpec {
        vmm: handler.program()?,
        virtiofsd: virtiofsd(handler)?,
        kernel,
        initramfs,
        kernel_args: handler.config.kernel_args.clone().unwrap_or_default(),
        cpus,
        memory_mib,
        acceleration,
        boot_timeout_ms: boot_seconds * 1000,
    }))
}

fn chosen_kernel<'a>(handler: &'a Handler, config: &'a PodSandboxConfig) -> Result<Option<&'a str>> {
    let default = handler.config.kernel.as_deref();
    let Some(wanted) = config.annotations.get(KERNEL_ANNOTATION) else {
        return Ok(default);
    };
    let allowed = handler.config.allowed_kernels.as_deref().unwrap_or_default();
    if default == Some(wanted.as_str()) || allowed.contains(wanted) {
        return Ok(Some(wanted));
    }
    Err(Error::invalid(
        format!("config.annotations[{KERNEL_ANNOTATION}]"),
        format!(
            "handler {} does not allow the kernel {wanted:?}; it allows {:?} (configuration key handlers.{}.allowed_kernels)",
            handler.name, allowed, handler.name
        ),
    ))
}

/// Kernel and initramfs by release, or the default of the first directory that has one.
pub(crate) fn artefacts(directories: &[PathBuf], kernel: Option<&str>) -> Result<(PathBuf, PathBuf)> {
    let name = kernel.unwrap_or(DEFAULT_LINK);
    if name.contains('/') || name.starts_with('.') {
        return Err(Error::invalid(
            "handlers.kernel",
            format!("{name:?} is not the name of a kernel release"),
        ));
    }
    for directory in directories {
        let release = directory.join(name);
        match GuestImage::read(&release) {
            Ok(image) => {
                // The link may move to a newer kernel while the pod lives.
                let release = std::fs::canonicalize(&release).map_err(Error::io("resolve", &release))?;
                let (kernel, initramfs) = image.paths(&release);
                for file in [&kernel, &initramfs] {
                    if !file.is_file() {
                        return Err(missing(&format!("{} does not exist", file.display())));
                    }
                }
                return Ok((kernel, initramfs));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(missing(&format!("{}: {error}", release.display()))),
        }
    }
    let places: Vec<String> = directories.iter().map(|dir| dir.display().to_string()).collect();
    Err(missing(&match kernel {
        None => format!("there is no guest kernel in {}", places.join(" or ")),
        Some(kernel) => format!("there is no guest kernel {kernel:?} in {}", places.join(" or ")),
    }))
}

fn missing(problem: &str) -> Error {
    Error::FailedPrecondition(format!(
        "a VM pod cannot be started: {problem}; run `catamaran guest build`"
    ))
}

fn virtiofsd(handler: &Handler) -> Result<PathBuf> {
    if let Some(path) = &handler.config.virtiofsd {
        return Ok(path.clone());
    }
    VIRTIOFSD.iter().map(Path::new).find(|path| path.is_file()).map(Path::to_owned).ok_or_else(|| {
        Error::FailedPrecondition(format!(
            "runtime handler {} cannot be used: virtiofsd is neither at {}; install it (Debian: qemu-system-common)",
            handler.name,
            VIRTIOFSD.join(" nor at ")
        ))
    })
}

/// CPUs and memory: one CPU and the base memory, or what the pod's limits (CRI `linux.resources`, the sum over
/// its containers) need on top.
fn size(handler: &Handler, config: &PodSandboxConfig, host_cpus: u32) -> Result<(u32, u32)> {
    let limits = config
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.clone())
        .unwrap_or_default();
    let base_cpus = handler.config.cpus.unwrap_or(DEFAULT_CPUS);
    let cpus = if limits.cpu_quota > 0 && limits.cpu_period > 0 {
        let wanted = (limits.cpu_quota + limits.cpu_period - 1) / limits.cpu_period;
        u32::try_from(wanted).unwrap_or(u32::MAX).max(1)
    } else {
        base_cpus
    };
    // A VM with more CPUs than the host has only loses by it.
    let cpus = cpus.min(host_cpus.max(1));
    let limit_mib = u64::try_from(limits.memory_limit_in_bytes.max(0))
        .unwrap_or(0)
        .div_ceil(1 << 20);
    let memory = u64::from(handler.config.memory_mib.unwrap_or(DEFAULT_MEMORY_MIB)) + limit_mib;
    let memory_mib = u32::try_from(memory).map_err(|_| {
        Error::invalid(
            "config.linux.resources.memory_limit_in_bytes",
            format!("{} is more than a VM can have", limits.memory_limit_in_bytes),
        )
    })?;
    Ok((cpus, memory_mib))
}

fn host_cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::cri::api::{LinuxContainerResources, LinuxPodSandboxConfig};
    use crate::handlers::Handlers;
    use crate::node::Dirs;

    fn handlers(text: &str) -> Handlers {
        let config: Config = serde_yaml::from_str(text).unwrap();
        Handlers::new(&config, &Dirs::new(Path::new("/r"), Path::new("/s")))
    }

    fn limited(quota: i64, memory: i64) -> PodSandboxConfig {
        PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig {
                resources: Some(LinuxContainerResources {
                    cpu_quota: quota,
                    cpu_period: 100_000,
                    memory_limit_in_bytes: memory,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_vm_is_as_large_as_its_pods_limits_and_a_base() {
        let handlers = handlers("log: info");
        let runv = handlers.resolve("runv").unwrap();
        assert_eq!(size(runv, &PodSandboxConfig::default(), 8).unwrap(), (1, 256));
        assert_eq!(size(runv, &limited(150_000, 100 << 20), 8).unwrap(), (2, 356));
        assert_eq!(
            size(runv, &limited(900_000, (100 << 20) + 1), 4).unwrap(),
            (4, 357)
        );
        assert!(size(runv, &limited(0, i64::MAX), 4).is_err());
    }

    #[test]
    fn only_allowed_kernels_can_be_chosen() {
        let handlers = handlers("handlers: {runv: {kernel: a, allowed_kernels: [b]}}");
        let runv = handlers.resolve("runv").unwrap();
        let with = |name: &str| PodSandboxConfig {
            annotations: [(KERNEL_ANNOTATION.to_owned(), name.to_owned())].into(),
            ..Default::default()
        };
        assert_eq!(
            chosen_kernel(runv, &PodSandboxConfig::default()).unwrap(),
            Some("a")
        );
        assert_eq!(chosen_kernel(runv, &with("a")).unwrap(), Some("a"));
        assert_eq!(chosen_kernel(runv, &with("b")).unwrap(), Some("b"));
        let error = chosen_kernel(runv, &with("../c")).unwrap_err();
        assert!(
            error.to_string().contains("annotations[catamaran.dev/kernel]"),
            "{error}"
        );
    }

    #[test]
    fn missing_artefacts_say_how_to_make_them() {
        let empty = tempfile::tempdir().unwrap();
        let error = artefacts(&[empty.path().to_owned()], None).unwrap_err();
        assert_eq!(error.code(), tonic::Code::FailedPrecondition);
        assert!(error.to_string().contains("catamaran guest build"), "{error}");
        assert!(artefacts(&[empty.path().to_owned()], Some("../x")).is_err());
    }
}
