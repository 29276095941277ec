//! The files of a pod that every container of it sees: resolv.conf, hosts, hostname, in the sandbox's bundle.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::cri::api::{DnsConfig, PodSandboxConfig};
use crate::error::{Error, Result};

/// resolv.conf(5) has no more in glibc before 2.26 and in musl.
const MAX_SERVERS: usize = 3;

/// Where the files are.
#[derive(Debug, Clone)]
pub(crate) struct Files {
    pub(crate) resolv_conf: PathBuf,
    pub(crate) hosts: PathBuf,
    pub(crate) hostname: PathBuf,
    pub(crate) shm: PathBuf,
}

impl Files {
    pub(crate) fn of(bundle: &Path) -> Self {
        Self {
            resolv_conf: bundle.join("resolv.conf"),
            hosts: bundle.join("hosts"),
            hostname: bundle.join("hostname"),
            shm: bundle.join("shm"),
        }
    }

    /// Writes what is known before the pod has addresses.
    pub(crate) fn write(&self, config: &PodSandboxConfig, host_network: bool, node_name: &str) -> Result<()> {
        let resolv_conf = match config
            .dns_config
            .as_ref()
            .filter(|dns| **dns != DnsConfig::default())
        {
            Some(dns) => resolv_conf(dns)?,
            None => read_host("/etc/resolv.conf")?,
        };
        write(&self.resolv_conf, &resolv_conf)?;
        let name = if config.hostname.is_empty() {
            node_name
        } else {
            &config.hostname
        };
        write(&self.hostname, &format!("{name}\n"))?;
        let hosts = if host_network {
            read_host("/etc/hosts")?
        } else {
            hosts(&[], &config.hostname)
        };
        write(&self.hosts, &hosts)
    }

    /// Adds the pod's own name, once its addresses are known.
    pub(crate) fn write_addresses(&self, ips: &[IpAddr], hostname: &str) -> Result<()> {
        write(&self.hosts, &hosts(ips, hostname))
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(Error::io("write", path))
}

/// A file of the node; one that is missing is empty.
fn read_host(path: &str) -> Result<String> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

fn resolv_conf(dns: &DnsConfig) -> Result<String> {
    let bad = |text: &&String| text.is_empty() || text.contains(char::is_whitespace);
    for (field, values) in [
        ("servers", &dns.servers),
        ("searches", &dns.searches),
        ("options", &dns.options),
    ] {
        if let Some(value) = values.iter().find(bad) {
            return Err(Error::invalid(
                format!("config.dns_config.{field}"),
                format!("{value:?} is not one word"),
            ));
        }
    }
    if dns.servers.len() > MAX_SERVERS {
        return Err(Error::invalid(
            "config.dns_config.servers",
            format!("{} are given; resolvers read {MAX_SERVERS}", dns.servers.len()),
        ));
    }
    let mut text = String::new();
    if !dns.searches.is_empty() {
        let _ = writeln!(text, "search {}", dns.searches.join(" "));
    }
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        let _ = writeln!(text, "options {}", dns.options.join(" "));
    }
    Ok(text)
}

fn hosts(ips: &[IpAddr], hostname: &str) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nfe00::\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
    );
    if !hostname.is_empty() {
        for ip in ips {
            let _ = writeln!(text, "{ip}\t{hostname}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dns_becomes_resolv_conf_and_injected_lines_are_refused() {
        let mut dns = DnsConfig {
            servers: vec!["10.0.0.1".into(), "10.0.0.2".into()],
            searches: vec!["a.b".into(), "c".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(
            resolv_conf(&dns).unwrap(),
            "search a.b c\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n"
        );
        dns.servers.push("1.1.1.1\nnameserver 6.6.6.6".into());
        assert!(
            resolv_conf(&dns)
                .unwrap_err()
                .to_string()
                .starts_with("config.dns_config.servers:")
        );
        dns.servers = vec!["10.0.0.1".into(); 4];
        assert!(resolv_conf(&dns).is_err());
    }

    #[test]
    fn the_pods_name_leads_to_its_addresses() {
        let text = hosts(&["10.1.2.3".parse().unwrap(), "fd00::5".parse().unwrap()], "web");
        assert!(text.contains("10.1.2.3\tweb\nfd00::5\tweb\n") && text.contains("127.0.0.1\tlocalhost"));
        assert_eq!(hosts(&[], "web"), hosts(&["10.1.2.3".parse().unwrap()], ""));
    }
}
