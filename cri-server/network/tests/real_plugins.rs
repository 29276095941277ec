//! Pods attached by the real plugins: they reach one another, host ports lead to them, and nothing is left
//! after DEL. Needs root, the CNI plugins (package containernetworking-plugins) and iptables.

mod lab;

use std::path::Path;

use catamaran_network::{Bandwidth, PortMapping, Protocol, Source};
use lab::{Lab, connects, inside, output, serve};

#[tokio::test]
async fn pods_of_the_default_network_reach_one_another() {
    let lab = Lab::new();
    let summary = lab.network.ready().await.unwrap();
    assert_eq!(
        (summary.source, summary.name.as_str()),
        (Source::Default, "catamaran")
    );

    let (a, b) = (lab.pod("a").await, lab.pod("b").await);
    let at_a = lab.network.attach(&a).await.unwrap();
    let at_b = lab.network.attach(&b).await.unwrap();
    assert_ne!(at_a.ips, at_b.ips);
    let ip = at_a.ips[0].to_string();
    assert!(ip.starts_with(&lab.prefix), "{ip}");
    let eth0 = at_a
        .interfaces
        .iter()
        .find(|interface| interface.name == "eth0")
        .unwrap();
    assert_eq!(eth0.addresses, [format!("{ip}/24")]);
    assert!(eth0.mac.is_some() && eth0.sandbox.as_deref() == a.netns.to_str());
    assert_eq!(at_a.routes[0].dst, "0.0.0.0/0");
    assert_eq!(lab.network.attached().unwrap(), [a.id.clone(), b.id.clone()]);
    assert_eq!(lab.network.attach(&a).await.unwrap(), at_a, "attached once");

    serve(&a, 8080);
    let address = format!("{ip}:8080");
    connects(&address).expect("from the host");
    let target = address.clone();
    inside(&b, move || connects(&target)).expect("from another pod");
    // Once, however many pods there are; and it goes with the network.
    let rule = || {
        let rules = output("iptables", &["-w", "-t", "nat", "-S", "POSTROUTING"]);
        rules
            .lines()
            .filter(|rule| rule.contains(&format!("default network {}", lab.config.default_bridge)))
            .count()
    };
    assert_eq!(rule(), 1);
    let forwarding = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap();
    assert_eq!(forwarding.trim(), "1");

    for pod in [&a, &b] {
        lab.network.detach(pod).await.unwrap();
        lab.network.detach(pod).await.unwrap();
    }
    assert_eq!(lab.leftovers(), [""; 0]);
    let bridge = Path::new("/sys/class/net").join(&lab.config.default_bridge);
    assert!(bridge.exists());
    for _ in 0..2 {
        lab.network.remove_default().await.unwrap();
        assert_eq!((rule(), bridge.exists()), (0, false));
    }
    let links = inside(&a, || {
        std::fs::read_to_string("/proc/thread-self/net/dev").unwrap()
    });
    assert!(!links.contains("eth0"), "{links}");
}

#[tokio::test]
async fn a_host_port_leads_to_the_pod() {
    let lab = Lab::new();
    let mut pod = lab.pod("web").await;
    // A free port; others may take it until the rule is set, which only adds a rule in front of them.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host_port = free.local_addr().unwrap().port();
    drop(free);
    pod.port_mappings = vec![PortMapping {
        host_ip: None,
        host_port,
        container_port: 80,
        protocol: Protocol::Tcp,
    }];
    let attachment = lab.network.attach(&pod).await.unwrap();
    serve(&pod, 80);
    connects(&format!("{}:80", attachment.ips[0])).expect("the pod's own port");
    connects(&format!("{}.1:{host_port}", lab.prefix)).expect("the host's port on the bridge's address");
    connects(&format!("127.0.0.1:{host_port}")).expect("the host's port on loopback");
    let client = lab.pod("client").await;
    lab.network.attach(&client).await.unwrap();
    let target = format!("{}.1:{host_port}", lab.prefix);
    inside(&client, move || connects(&target)).expect("the host's port from another pod");
    let target = format!("{}.1:{host_port}", lab.prefix);
    inside(&pod, move || connects(&target)).expect("the host's port from the pod itself");

    lab.network.detach(&pod).await.unwrap();
    lab.network.detach(&client).await.unwrap();
    assert_eq!(lab.leftovers(), [""; 0]);
    assert!(!output("iptables", &["-w", "-t", "nat", "-S"]).contains(&format!("--dport {host_port} ")));
}

#[tokio::test]
async fn bandwidth_limits_are_applied() {
    let lab = Lab::new();
    let mut pod = lab.pod("slow").await;
    let rate = 8_000_000;
    pod.bandwidth = Some(Bandwidth {
        ingress_rate: rate,
        ingress_burst: rate,
        egress_rate: rate,
        egress_burst: rate,
    });
    match lab.network.attach(&pod).await {
        Ok(_) => {
            let queues = output("tc", &["qdisc", "show"]);
            assert!(queues.contains("tbf"), "{queues}");
        }
        // A kernel without ifb or tbf: then it must be refused, never passed over.
        Err(error) => {
            let error = error.to_string();
            assert!(error.contains("cni plugin bandwidth refused ADD"), "{error}");
            println!("skipped: bandwidth_limits_are_applied (traffic control): {error}");
        }
    }
    lab.network.detach(&pod).await.unwrap();
    assert_eq!(lab.leftovers(), [""; 0]);
}

#[tokio::test]
async fn both_families_are_attached() {
    let mut lab = Lab::new();
    let v6 = format!("fd00:{:x}::/64", std::process::id() & 0xffff);
    lab.config.default_subnet = format!("{},{v6}", lab.config.default_subnet);
    lab.network = catamaran_network::Network::new(lab.config.clone());
    let pod = lab.pod("dual").await;
    let attachment = lab.network.attach(&pod).await.unwrap();
    assert!(
        attachment.ips[0].is_ipv4() && attachment.ips[1].is_ipv6(),
        "{:?}",
        attachment.ips
    );
    lab.network.detach(&pod).await.unwrap();
    assert_eq!(lab.leftovers(), [""; 0]);
}

#[tokio::test]
async fn detach_works_when_the_namespace_is_gone() {
    let lab = Lab::new();
    let pod = lab.pod("gone").await;
    lab.network.attach(&pod).await.unwrap();
    lab.network.remove_netns(&pod.id).await.unwrap();
    assert!(!Path::new(&pod.netns).exists());
    // What a restarted daemon does, with nothing but the id.
    let restarted = catamaran_network::Network::new(lab.config.clone());
    assert_eq!(restarted.attached().unwrap(), std::slice::from_ref(&pod.id));
    restarted.detach_id(&pod.id).await.unwrap();
    assert_eq!(lab.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_record_that_a_power_failure_left_empty_is_forgotten() {
    let lab = Lab::new();
    std::fs::create_dir_all(&lab.config.cache_dir).unwrap();
    std::fs::write(lab.config.cache_dir.join("pod1.intent"), "").unwrap();
    assert_eq!(lab.network.attached().unwrap(), ["pod1"]);
    lab.network.detach_id("pod1").await.unwrap();
    assert_eq!(lab.leftovers(), [""; 0]);
}

#[tokio::test]
async fn an_operators_conflist_wins_and_del_uses_what_add_used() {
    let lab = Lab::new();
    let portmap = r#"{"type":"portmap","capabilities":{"portMappings":true}}"#;
    lab.conflist("0.4.0", &format!("{},{portmap}", lab.bridge()));
    let summary = lab.network.status().unwrap();
    assert_eq!(
        summary.source,
        Source::File(lab.config.conf_dir.join("10-lab.conflist"))
    );
    assert_eq!((summary.name.as_str(), summary.plugins.len()), ("lab", 2));
    let pod = lab.pod("a").await;
    let attachment = lab.network.attach(&pod).await.unwrap();
    assert_eq!(attachment.result["cniVersion"], "0.4.0");
    // The operator replaces the network while the pod lives.
    lab.conflist("1.0.0", r#"{"type":"no-such-plugin"}"#);
    let reason = lab.network.status().unwrap_err();
    assert!(
        reason.contains("no-such-plugin") && reason.contains("install"),
        "{reason}"
    );
    lab.network.detach(&pod).await.unwrap();
    assert_eq!(lab.leftovers(), [""; 0]);
}

#[tokio::test]
async fn twenty_pods_come_and_go_at_once() {
    let lab = Lab::new();
    let mut pods = Vec::new();
    for index in 0..20 {
        pods.push(lab.pod(&format!("p{index}")).await);
    }
    let attach = |pod: &catamaran_network::PodNetwork| {
        let (network, pod) = (lab.network.clone(), pod.clone());
        tokio::spawn(async move { network.attach(&pod).await.map(|attachment| attachment.ips[0]) })
    };
    let mut ips = std::collections::BTreeSet::new();
    for task in pods.iter().map(attach).collect::<Vec<_>>() {
        ips.insert(task.await.unwrap().unwrap());
    }
    assert_eq!(ips.len(), 20, "each has its own address");
    let detach = |pod: &catamaran_network::PodNetwork| {
        let (network, pod) = (lab.network.clone(), pod.clone());
        tokio::spawn(async move { network.detach(&pod).await })
    };
    for task in pods.iter().map(detach).collect::<Vec<_>>() {
        task.await.unwrap().unwrap();
    }
    assert_eq!(lab.leftovers(), [""; 0]);
}
