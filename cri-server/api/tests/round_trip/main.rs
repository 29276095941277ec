//! An independent binding of the CRI (crate k8s-cri, generated elsewhere from an older release of the
//! interface) checks our wire format: every one of its messages, all fields set, survives the way through
//! our type of that name.

mod filler;

use std::fmt::Debug;

use prost::Message;
use serde::de::DeserializeOwned;

fn round_trip<Theirs, Ours>(name: &str)
where
    Theirs: Message + DeserializeOwned + PartialEq + Debug + Default,
    Ours: Message + Default,
{
    for variant in 0..4 {
        let mut next = 0;
        let theirs = <Theirs as serde::Deserialize>::deserialize(filler::Filler {
            next: &mut next,
            variant,
        })
        .unwrap_or_else(|error| panic!("{name}: {error}"));
        let ours = Ours::decode(theirs.encode_to_vec().as_slice())
            .unwrap_or_else(|error| panic!("{name}: our type does not read theirs: {error}"));
        let back = Theirs::decode(ours.encode_to_vec().as_slice())
            .unwrap_or_else(|error| panic!("{name}: their type does not read ours: {error}"));
        assert_eq!(
            theirs, back,
            "{name} lost or changed a field on the way through our type"
        );
    }
}

macro_rules! messages {
    ($($name:ident),* $(,)?) => {
        /// Every message of k8s-cri's v1 by name.
        fn all() -> Vec<(&'static str, fn(&str))> {
            vec![$((stringify!($name), round_trip::<k8s_cri::v1::$name, catamaran_cri_api::v1::$name>)),*]
        }
    };
}

messages!(
    AttachRequest,
    AttachResponse,
    AuthConfig,
    CdiDevice,
    Capability,
    CheckpointContainerRequest,
    CheckpointContainerResponse,
    Container,
    ContainerAttributes,
    ContainerConfig,
    ContainerEventResponse,
    ContainerFilter,
    ContainerMetadata,
    ContainerMetrics,
    ContainerResources,
    ContainerStateValue,
    ContainerStats,
    ContainerStatsFilter,
    ContainerStatsRequest,
    ContainerStatsResponse,
    ContainerStatus,
    ContainerStatusRequest,
    ContainerStatusResponse,
    ContainerUser,
    CpuUsage,
    CreateContainerRequest,
    CreateContainerResponse,
    DnsConfig,
    Device,
    ExecRequest,
    ExecResponse,
    ExecSyncRequest,
    ExecSyncResponse,
    FilesystemIdentifier,
    FilesystemUsage,
    GetEventsRequest,
    HugepageLimit,
    IdMapping,
    Image,
    ImageFilter,
    ImageFsInfoRequest,
    ImageFsInfoResponse,
    ImageSpec,
    ImageStatusRequest,
    ImageStatusResponse,
    Int64Value,
    KeyValue,
    LinuxContainerConfig,
    LinuxContainerResources,
    LinuxContainerSecurityContext,
    LinuxContainerUser,
    LinuxPodSandboxConfig,
    LinuxPodSandboxStats,
    LinuxPodSandboxStatus,
    LinuxRuntimeConfiguration,
    LinuxSandboxSecurityContext,
    ListContainerStatsRequest,
    ListContainerStatsResponse,
    ListContainersRequest,
    ListContainersResponse,
    ListImagesRequest,
    ListImagesResponse,
    ListMetricDescriptorsRequest,
    ListMetricDescriptorsResponse,
    ListPodSandboxMetricsRequest,
    ListPodSandboxMetricsResponse,
    ListPodSandboxRequest,
    ListPodSandboxResponse,
    ListPodSandboxStatsRequest,
    ListPodSandboxStatsResponse,
    MemoryUsage,
    Metric,
    MetricDescriptor,
    Mount,
    Namespace,
    NamespaceOption,
    NetworkConfig,
    NetworkInterfaceUsage,
    NetworkUsage,
    PodIp,
    PodSandbox,
    PodSandboxAttributes,
    PodSandboxConfig,
    PodSandboxFilter,
    PodSandboxMetadata,
    PodSandboxMetrics,
    PodSandboxNetworkStatus,
    PodSandboxStateValue,
    PodSandboxStats,
    PodSandboxStatsFilter,
    PodSandboxStatsRequest,
    PodSandboxStatsResponse,
    PodSandboxStatus,
    PodSandboxStatusRequest,
    PodSandboxStatusResponse,
    PortForwardRequest,
    PortForwardResponse,
    PortMapping,
    ProcessUsage,
    PullImageRequest,
    PullImageResponse,
    RemoveContainerRequest,
    RemoveContainerResponse,
    RemoveImageRequest,
    RemoveImageResponse,
    RemovePodSandboxRequest,
    RemovePodSandboxResponse,
    ReopenContainerLogRequest,
    ReopenContainerLogResponse,
    RunPodSandboxRequest,
    RunPodSandboxResponse,
    RuntimeCondition,
    RuntimeConfig,
    RuntimeConfigRequest,
    RuntimeConfigResponse,
    RuntimeFeatures,
    RuntimeHandler,
    RuntimeHandlerFeatures,
    RuntimeStatus,
    SeLinuxOption,
    SecurityProfile,
    StartContainerRequest,
    StartContainerResponse,
    StatusRequest,
    StatusResponse,
    StopContainerRequest,
    StopContainerResponse,
    StopPodSandboxRequest,
    StopPodSandboxResponse,
    SwapUsage,
    UInt64Value,
    UpdateContainerResourcesRequest,
    UpdateContainerResourcesResponse,
    UpdateRuntimeConfigRequest,
    UpdateRuntimeConfigResponse,
    UserNamespace,
    VersionRequest,
    VersionResponse,
    WindowsContainerConfig,
    WindowsContainerResources,
    WindowsContainerSecurityContext,
    WindowsContainerStats,
    WindowsCpuGroupAffinity,
    WindowsCpuUsage,
    WindowsFilesystemUsage,
    WindowsMemoryUsage,
    WindowsNamespaceOption,
    WindowsNetworkInterfaceUsage,
    WindowsNetworkUsage,
    WindowsPodSandboxConfig,
    WindowsPodSandboxStats,
    WindowsProcessUsage,
    WindowsSandboxSecurityContext
);

#[test]
fn every_k8s_cri_message_survives_ours() {
    for (name, check) in all() {
        check(name);
    }
}

#[test]
fn the_filler_leaves_nothing_at_its_default() {
    let mut next = 0;
    let filled = <k8s_cri::v1::PodSandboxConfig as serde::Deserialize>::deserialize(filler::Filler {
        next: &mut next,
        variant: 0,
    })
    .unwrap();
    let linux = filled.linux.expect("options are filled");
    assert_eq!(linux.sysctls.len(), 2, "maps get two entries");
    assert_eq!(filled.port_mappings.len(), 2, "lists get two entries");
    assert!(
        linux
            .security_context
            .expect("nested options are filled")
            .privileged
    );
}
