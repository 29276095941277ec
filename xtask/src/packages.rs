//! Debian packages, in this one place, each with what needs it.

/// To build, run and test. All are in Debian 12.
pub(crate) const NEEDED: &[(&str, &str)] = &[
    ("busybox-static", "the tests' images"),
    (
        "containerd",
        "peer of the benchmark and of the harness's own proof",
    ),
    ("containernetworking-plugins", "CNI bridge, host-local, portmap"),
    ("docker-registry", "the tests' registry"),
    ("iproute2", "test networks"),
    ("iptables", "masquerading and host ports"),
    ("libseccomp-dev", "seccomp in the guest's static agent"),
    ("linux-image-cloud-amd64", "kernel of VM pods"),
    ("qemu-system-common", "virtiofsd"),
    ("qemu-system-x86", "VM pods"),
    ("runc", "namespace pods"),
    ("runsc", "tests: a further OCI runtime behind a RuntimeClass"),
    ("skopeo", "quickstart: pushes its image"),
];

/// To build the minimal guest kernel as well (`cargo xtask guest-kernel`).
pub(crate) const KERNEL: &[(&str, &str)] = &[
    ("bc", "kernel build"),
    ("bison", "kernel build"),
    ("build-essential", "kernel build"),
    ("flex", "kernel build"),
    ("libelf-dev", "kernel build"),
    ("linux-source-6.12", "the source itself"),
    ("lz4", "kernel build"),
    ("xz-utils", "kernel build"),
];
