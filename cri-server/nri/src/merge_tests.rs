//! Merging and its conflicts.

use super::*;

fn adjusted(env: &[(&str, &str)], mounts: &[&str]) -> api::CreateContainerResponse {
    api::CreateContainerResponse {
        adjust: Some(ContainerAdjustment {
            env: env
                .iter()
                .map(|(k, v)| KeyValue {
                    key: (*k).into(),
                    value: (*v).into(),
                })
                .collect(),
            mounts: mounts
                .iter()
                .map(|d| Mount {
                    destination: (*d).into(),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn creation() -> Creation {
    Creation::new(Container {
        id: "c1".into(),
        env: vec!["OLD=1".into(), "KEEP=2".into()],
        ..Default::default()
    })
}

fn limited(id: &str, limit: i64, ignore_failure: bool) -> ContainerUpdate {
    let memory = api::LinuxMemory {
        limit: Some(api::OptionalInt64 { value: limit }),
        ..Default::default()
    };
    let resources = LinuxResources {
        memory: Some(memory),
        ..Default::default()
    };
    ContainerUpdate {
        container_id: id.into(),
        linux: Some(api::LinuxContainerUpdate {
            resources: Some(resources),
        }),
        ignore_failure,
    }
}

#[test]
fn later_plugins_see_what_earlier_ones_did() {
    let mut creation = creation();
    creation
        .apply(adjusted(&[("A", "1"), ("-OLD", "")], &["/a"]), "00-one")
        .unwrap();
    assert_eq!(creation.container.env, ["KEEP=2", "A=1"]);
    creation
        .apply(adjusted(&[("B", "2")], &["/b"]), "10-two")
        .unwrap();
    assert_eq!(creation.container.env, ["KEEP=2", "A=1", "B=2"]);
    let keys: Vec<&str> = creation.adjust.env.iter().map(|v| v.key.as_str()).collect();
    assert_eq!(keys, ["-OLD", "A", "B"]);
    assert_eq!(creation.adjust.mounts.len(), 2);
    let owners = creation.updates.claims.message();
    let env = &owners.owners["c1"].compound[&(Field::Env as i32)].owners;
    assert_eq!((env["A"].as_str(), env["B"].as_str()), ("00-one", "10-two"));
}

#[test]
fn a_conflict_names_the_field_and_both_plugins() {
    let mut both = creation();
    both.apply(adjusted(&[], &["/data"]), "00-one").unwrap();
    let error = both
        .apply(adjusted(&[], &["/data"]), "10-two")
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "NRI plugins 00-one and 10-two both set Mounts /data of container c1; only one may"
    );
}

#[test]
fn what_a_plugin_removes_it_may_set_anew() {
    let mut creation = creation();
    creation.apply(adjusted(&[("A", "1")], &[]), "00-one").unwrap();
    creation
        .apply(adjusted(&[("-A", ""), ("A", "2")], &[]), "10-two")
        .unwrap();
    assert_eq!(creation.container.env, ["OLD=1", "KEEP=2", "A=2"]);
    assert!(creation.apply(adjusted(&[("A", "3")], &[]), "20-three").is_err());
}

#[test]
fn an_update_of_the_container_being_created_is_refused() {
    let answer = api::CreateContainerResponse {
        update: vec![limited("c1", 1, false)],
        ..Default::default()
    };
    assert!(matches!(
        creation().apply(answer, "00-one"),
        Err(Error::UpdateOfNew { .. })
    ));
}

#[test]
fn an_update_that_may_fail_gives_way() {
    let mut updates = Updates::default();
    updates
        .apply(vec![limited("x", 1, false)], Vec::new(), "00-one")
        .unwrap();
    updates
        .apply(vec![limited("x", 2, true)], Vec::new(), "10-two")
        .unwrap();
    assert!(
        updates
            .apply(vec![limited("x", 3, false)], Vec::new(), "20-three")
            .is_err()
    );
    assert_eq!(updates.finish().updates, vec![limited("x", 1, false)]);
}

#[test]
fn resources_are_overlaid_field_by_field() {
    let mut into = LinuxResources::default();
    let first = limited("x", 5, false).linux.unwrap().resources.unwrap();
    overlay(&first, &mut into);
    let cpu = api::LinuxCpu {
        cpus: "0-1".into(),
        ..Default::default()
    };
    overlay(
        &LinuxResources {
            cpu: Some(cpu),
            ..Default::default()
        },
        &mut into,
    );
    assert_eq!(into.memory.unwrap().limit.unwrap().value, 5);
    assert_eq!(into.cpu.unwrap().cpus, "0-1");
}
