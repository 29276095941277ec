//! What a pod gives to its containers: addresses, host ports, names, shared namespaces, sysctls.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use catamaran_e2e::case::Case;
use catamaran_e2e::node::{Options, Pod};
use catamaran_e2e::registry::free_port;
use catamaran_e2e::suite::{Handler, Suite};
use serde_json::json;

fn main() -> ExitCode {
    Suite::new(|| Ok(Options::default()))
        .both("the_address_answers_from_the_host_and_from_another_pod", address)
        .both("a_pod_reaches_the_host", outward)
        .both("host_ports", host_ports)
        .both("resolv_conf_hosts_and_hostname", names)
        .both("pod_sysctls", sysctls)
        .both("low_ports_and_ping_need_no_privileges", unprivileged)
        .both("a_shared_pid_namespace", shared_pid)
        .both("ipc_and_shm_are_the_pods", ipc)
        .one(Handler::Runc, "host_network_pid_and_ipc", host_namespaces)
        .one(
            Handler::Runv,
            "host_namespaces_are_refused",
            host_namespaces_refused,
        )
        .both("pods_run_side_by_side", side_by_side)
        .main()
}

/// Starts a web server in the pod on port 8080.
fn serve(t: &Case<'_>, pod: &Pod) -> Result<String> {
    t.start(
        pod,
        &t.script(
            "server",
            "mkdir /w; hostname > /w/index.html; exec httpd -f -p 8080 -h /w",
        ),
    )
}

fn fetch(address: &str) -> Result<String> {
    let address: SocketAddr = address.parse()?;
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(3))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text
        .rsplit("\r\n\r\n")
        .next()
        .unwrap_or_default()
        .trim()
        .to_owned())
}

fn address(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    serve(t, &pod)?;
    let ip = t.address(&pod)?;
    ensure!(ip.starts_with(&t.node.subnet.prefix()), "{ip}");
    let page = t.eventually(Duration::from_secs(15), || fetch(&format!("{ip}:8080")))?;
    ensure!(page == pod.request.name(), "{page}");
    // From the pod itself by its own address, and from another pod of the same handler.
    let inside = t.start(&pod, &t.idle("inside"))?;
    ensure!(t.fetch_inside(&inside, &ip, 8080)? == page);
    ensure!(
        t.shell(&inside, "ip -4 -o addr show dev eth0")?
            .contains(&format!("inet {ip}/24"))
    );
    let other = t.pod()?;
    let client = t.start(&other, &t.idle("client"))?;
    ensure!(t.fetch_inside(&client, &ip, 8080)? == page);
    Ok(())
}

fn outward(t: &Case<'_>) -> Result<()> {
    // The registry listens on loopback only, so the host's side of the pod network gets a listener of its own.
    let pod = t.pod()?;
    let gateway = format!("{}1", t.node.subnet.prefix());
    let listener = std::net::TcpListener::bind((gateway.as_str(), 0)).context("listening on the bridge")?;
    let port = listener.local_addr()?.port();
    let server = std::thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.write_all(b"from-host\n")?;
        Ok(())
    });
    let logs = t.run_script(&pod, "main", &format!("nc -w 5 {gateway} {port}; ip route"))?;
    ensure!(
        logs.contains("from-host") && logs.contains(&format!("default via {gateway}")),
        "{logs}"
    );
    server
        .join()
        .map_err(|_| anyhow::anyhow!("the listener panicked"))??;
    Ok(())
}

fn host_ports(t: &Case<'_>) -> Result<()> {
    let port = free_port()?.port();
    let mapping = json!([{"protocol": 0, "container_port": 8080, "host_port": port}]);
    let pod = t.run_pod(&t.pod_request().set("/port_mappings", mapping))?;
    serve(t, &pod)?;
    for host in ["127.0.0.1".to_owned(), format!("{}1", t.node.subnet.prefix())] {
        let page = t
            .eventually(Duration::from_secs(15), || fetch(&format!("{host}:{port}")))
            .with_context(|| format!("host port on {host}"))?;
        ensure!(page == pod.request.name(), "{page}");
    }
    t.node.remove_pod(&pod.id)?;
    ensure!(
        fetch(&format!("127.0.0.1:{port}")).is_err(),
        "the host port answers after the pod is gone"
    );
    Ok(())
}

fn names(t: &Case<'_>) -> Result<()> {
    let request = t.pod_request().set(
        "/dns_config",
        json!({"servers": ["10.9.8.7"], "searches": ["a.example", "b.example"], "options": ["ndots:5"]}),
    );
    let pod = t.run_pod(&request)?;
    let logs = t.run_script(
        &pod,
        "main",
        "cat /etc/resolv.conf; cat /etc/hosts; hostname; cat /etc/hostname",
    )?;
    for line in [
        "nameserver 10.9.8.7",
        "search a.example b.example",
        "options ndots:5",
    ] {
        ensure!(logs.lines().any(|l| l.trim() == line), "{line} is not in {logs}");
    }
    ensure!(logs.contains("localhost"), "{logs}");
    ensure!(
        logs.matches(request.name()).count() >= 2,
        "the hostname is the pod's: {logs}"
    );
    let plain = t.run_script(
        &t.pod()?,
        "plain",
        "grep -c nameserver /etc/resolv.conf || cat /etc/resolv.conf",
    )?;
    let host = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let expected = host.lines().filter(|l| l.starts_with("nameserver")).count();
    ensure!(
        plain.starts_with(&expected.to_string()),
        "without a configuration it is the host's: {plain}"
    );
    Ok(())
}

fn sysctls(t: &Case<'_>) -> Result<()> {
    let wanted = json!({"net.ipv4.ip_unprivileged_port_start": "80", "kernel.shm_rmid_forced": "1"});
    let pod = t.run_pod(&t.pod_request().set("/linux/sysctls", wanted))?;
    let script = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced";
    let logs = t.run_script(&pod, "main", script)?;
    ensure!(logs == "80\n1\n", "{logs}");
    Ok(())
}

fn unprivileged(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let script = "cat /proc/sys/net/ipv4/ping_group_range | tr '\\t' ' '; id -u; \
                  nc -l -p 80 </dev/null >/tmp/n 2>&1 & sleep 1; netstat -ltn | grep -c ':80 '";
    let security = "/linux/security_context";
    let request = t
        .script("main", script)
        .set(&format!("{security}/run_as_user"), json!({"value": 1000}))
        .set(
            &format!("{security}/capabilities"),
            json!({"drop_capabilities": ["ALL"]}),
        );
    let logs = t.run(&pod, &request)?.logs;
    ensure!(logs == "0 2147483647\n1000\n1\n", "{logs}");
    Ok(())
}

fn shared_pid(t: &Case<'_>) -> Result<()> {
    let options = "/linux/security_context/namespace_options/pid";
    let pod = t.run_pod(&t.pod_request().set(options, json!(0)))?;
    let first = t.start(&pod, &t.script("first", "exec sleep 7777").set(options, json!(0)))?;
    let second = t.start(&pod, &t.idle("second").set(options, json!(0)))?;
    let seen = t.shell(&second, "ps")?;
    ensure!(seen.contains("sleep 7777"), "{seen}");
    ensure!(t.shell(&second, "[ $$ != 1 ] && cat /proc/1/comm")?.len() > 1);
    t.shell(&second, "kill $(pidof sleep | tr ' ' '\\n' | while read p; do grep -q 7777 /proc/$p/cmdline && echo $p; done)")?;
    let ended = t.wait_exited(&first)?;
    ensure!(ended.code() == 143, "{}", ended.status);
    ensure!(t.status(&second)?["state"] == "CONTAINER_RUNNING");
    Ok(())
}

fn ipc(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let first = t.start(&pod, &t.idle("first"))?;
    let second = t.start(&pod, &t.idle("second"))?;
    t.shell(&first, "echo shared > /dev/shm/x")?;
    ensure!(t.shell(&second, "cat /dev/shm/x")? == "shared");
    ensure!(
        t.shell(&first, "readlink /proc/self/ns/ipc")? == t.shell(&second, "readlink /proc/self/ns/ipc")?
    );
    let other = t.start(&t.pod()?, &t.idle("other"))?;
    ensure!(t.shell(&other, "ls /dev/shm")?.is_empty());
    Ok(())
}

fn host_namespaces(t: &Case<'_>) -> Result<()> {
    let all = json!({"network": 2, "pid": 2, "ipc": 2});
    let options = "/linux/security_context/namespace_options";
    let pod = t.run_pod(
        &t.pod_request()
            .set("/hostname", json!(""))
            .set(options, all.clone()),
    )?;
    let id = t.start(&pod, &t.idle("main").set(options, all))?;
    for name in ["net", "pid", "ipc", "uts"] {
        let host = std::fs::read_link(format!("/proc/self/ns/{name}"))?;
        let inside = t.shell(&id, &format!("readlink /proc/self/ns/{name}"))?;
        ensure!(
            inside == host.to_string_lossy(),
            "{name}: {inside} inside, {} on the host",
            host.display()
        );
    }
    ensure!(t.shell(&id, "ls /sys/class/net")?.contains(&t.node.subnet.name()));
    Ok(())
}

fn host_namespaces_refused(t: &Case<'_>) -> Result<()> {
    for (key, word) in [("network", "hostNetwork"), ("pid", "hostPID"), ("ipc", "hostIPC")] {
        let pointer = format!("/linux/security_context/namespace_options/{key}");
        let message = t
            .node
            .run_pod_fails("runv", &t.pod_request().set(&pointer, json!(2)))?;
        ensure!(message.contains("InvalidArgument"), "{key}: {message}");
        let named = message.to_lowercase();
        ensure!(
            named.contains(&word.to_lowercase()) || named.contains(key),
            "{key}: {message}"
        );
    }
    Ok(())
}

fn side_by_side(t: &Case<'_>) -> Result<()> {
    let pods = (0..3).map(|_| t.pod()).collect::<Result<Vec<_>>>()?;
    let mut addresses = pods
        .iter()
        .map(|pod| t.address(pod))
        .collect::<Result<Vec<_>>>()?;
    addresses.sort();
    addresses.dedup();
    ensure!(addresses.len() == pods.len(), "{addresses:?}");
    for pod in &pods {
        let logs = t.run_script(pod, "main", "hostname")?;
        ensure!(logs.trim() == pod.request.name(), "{logs}");
    }
    Ok(())
}
