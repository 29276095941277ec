//! The protocols between daemon and shim, all on one unix socket with ttrpc framing: containerd's Task
//! (`containerd.task.v3.Task`) and Sandbox (`containerd.runtime.sandbox.v1.Sandbox`) services, re-exported
//! from containerd-shim-protos, and our own Stream service.

/// Stream service messages.
#[allow(missing_docs, unreachable_pub, clippy::all, warnings)]
pub mod stream {
    include!(concat!(env!("OUT_DIR"), "/stream.rs"));
}

/// Stream service: async client and server.
#[allow(missing_docs, unreachable_pub, clippy::all, warnings)]
pub mod stream_ttrpc {
    use super::stream;
    include!(concat!(env!("OUT_DIR"), "/stream_ttrpc.rs"));
}

/// `type_url` of a [`crate::pod_spec::PodSpec`] in JSON, the options of the Sandbox service's CreateSandbox.
pub const POD_SPEC_TYPE: &str = "catamaran.sandbox.v1/PodSpec";
/// `type_url` of an OCI runtime-spec Process in JSON, as containerd spells it (Task.Exec).
pub const OCI_PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// `type_url` of OCI runtime-spec LinuxResources in JSON, as containerd spells it (Task.Update).
pub const OCI_RESOURCES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// Task.Create `stdout`: the rest of the URI is the absolute path of a CRI log file that the shim writes
/// (both streams; `stderr` is left empty). A path without a scheme is a FIFO, as containerd passes it.
pub const CRI_LOG_SCHEME: &str = "cri-log://";
/// Task.Create `stdout` for a container without a log path: output is only for those who attach.
pub const DISCARD_OUTPUT: &str = "discard:";
/// Task.Create `stdin`: a pipe that attach writes to and that stays open between attachments.
pub const STDIN_KEEP: &str = "stream:keep";
/// Task.Create `stdin`: a pipe that closes when its first attachment ends (CRI `stdin_once`).
pub const STDIN_ONCE: &str = "stream:once";
