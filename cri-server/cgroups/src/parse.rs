//! Readers of the kernel's text formats (cgroup-v2.rst, "Interface File Conventions"; cgroup-v1's files;
//! psi.rst; proc_pid_net(5)). Pure; unknown keys are passed over, since each kernel adds some.

use crate::network::InterfaceStats;
use crate::stats::{IoDevice, Pressure, Stall};

/// A single number.
pub(crate) fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// A limit of version 2: `max` is none. The outer `None` is no limit at all in the text.
pub(crate) fn limit(text: &str) -> Option<Option<u64>> {
    match text.trim() {
        "max" => Some(None),
        text => text.parse().ok().map(Some),
    }
}

/// A byte limit of version 1, where unlimited is the greatest page-aligned number.
pub(crate) fn limit_v1(text: &str) -> Option<Option<u64>> {
    const UNLIMITED: u64 = 0x7fff_ffff_0000_0000;
    number(text).map(|bytes| (bytes < UNLIMITED).then_some(bytes))
}

/// Flat keyed: a name and a number on each line.
pub(crate) fn keyed(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}

/// `io.stat` of version 2: a device, then `key=number` words.
pub(crate) fn io_stat(text: &str) -> Vec<IoDevice> {
    let line = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (major, minor) = device(words.next()?)?;
        let mut io = IoDevice {
            major,
            minor,
            ..IoDevice::default()
        };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let slot = match key {
                "rbytes" => &mut io.read_bytes,
                "wbytes" => &mut io.write_bytes,
                "rios" => &mut io.read_operations,
                "wios" => &mut io.write_operations,
                _ => continue,
            };
            *slot = value.parse().unwrap_or(0);
        }
        Some(io)
    };
    text.lines().filter_map(line).collect()
}

/// A blkio file of version 1: a device, `Read` or `Write` (or others) and a number on each line. `into` says
/// where the number of the two goes.
pub(crate) fn blkio(
    text: &str,
    devices: &mut Vec<IoDevice>,
    into: impl Fn(&mut IoDevice) -> (&mut u64, &mut u64),
) {
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(device_name), Some(operation), Some(value)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        let (Some((major, minor)), Ok(value)) = (device(device_name), value.parse::<u64>()) else {
            continue;
        };
        let known = devices
            .iter()
            .position(|io| (io.major, io.minor) == (major, minor));
        let index = known.unwrap_or_else(|| {
            devices.push(IoDevice {
                major,
                minor,
                ..IoDevice::default()
            });
            devices.len() - 1
        });
        let (read, write) = into(&mut devices[index]);
        match operation {
            "Read" => *read = value,
            "Write" => *write = value,
            _ => {}
        }
    }
}

fn device(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A pressure file; `full` is absent for the CPU before Linux 5.13.
pub(crate) fn pressure(text: &str) -> Option<Pressure> {
    let mut pressure = Pressure::default();
    let mut any = false;
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let stall = match words.next() {
            Some("some") => &mut pressure.some,
            Some("full") => &mut pressure.full,
            _ => continue,
        };
        *stall = stall_of(words);
        any = true;
    }
    any.then_some(pressure)
}

fn stall_of<'a>(words: impl Iterator<Item = &'a str>) -> Stall {
    let mut stall = Stall::default();
    for (key, value) in words.filter_map(|word| word.split_once('=')) {
        let average = || {
            value
                .parse::<f64>()
                .ok()
                .filter(|share| share.is_finite())
                .unwrap_or(0.0)
        };
        match key {
            "avg10" => stall.avg10 = average(),
            "avg60" => stall.avg60 = average(),
            "avg300" => stall.avg300 = average(),
            "total" => stall.total_us = value.parse().unwrap_or(0),
            _ => {}
        }
    }
    stall
}

/// `/proc/<pid>/net/dev`: two lines of head, then a name with a colon and sixteen counters.
pub(crate) fn net_dev(text: &str) -> Vec<InterfaceStats> {
    let line = |line: &str| {
        let (name, counters) = line.rsplit_once(':')?;
        let mut values = [0u64; 16];
        let mut words = counters.split_ascii_whitespace();
        for value in &mut values {
            *value = words.next()?.parse().ok()?;
        }
        let [
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            _,
            _,
            _,
            _,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
            ..,
        ] = values;
        let name = name.trim().to_owned();
        Some(InterfaceStats {
            name,
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
        })
    };
    text.lines().skip(2).filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn limits_are_told_from_none() {
        assert_eq!(limit("max\n"), Some(None));
        assert_eq!(limit("4096\n"), Some(Some(4096)));
        assert_eq!(limit(""), None);
        assert_eq!(limit_v1("9223372036854771712\n"), Some(None));
        assert_eq!(limit_v1("1048576\n"), Some(Some(1_048_576)));
    }

    #[test]
    fn io_of_both_versions_is_the_same() {
        let v2 = io_stat("254:0 rbytes=4096 wbytes=512 rios=2 wios=1 dbytes=0 dios=0\n7:1 \n");
        let mut v1 = Vec::new();
        blkio(
            "254:0 Read 4096\n254:0 Write 512\n254:0 Sync 1\n254:0 Total 4608\nTotal 4608\n",
            &mut v1,
            |io| (&mut io.read_bytes, &mut io.write_bytes),
        );
        blkio("254:0 Read 2\n254:0 Write 1\nTotal 3\n", &mut v1, |io| {
            (&mut io.read_operations, &mut io.write_operations)
        });
        assert_eq!(v1, v2[..1]);
        assert_eq!(
            v2[1],
            IoDevice {
                major: 7,
                minor: 1,
                ..IoDevice::default()
            }
        );
    }

    #[test]
    fn pressure_is_read() {
        let text = "some avg10=0.70 avg60=1.34 avg300=8.07 total=118035834\n\
                    full avg10=0.00 avg60=0.00 avg300=0.50 total=7\n";
        let both = pressure(text).unwrap();
        assert_eq!(
            both.some,
            Stall {
                avg10: 0.70,
                avg60: 1.34,
                avg300: 8.07,
                total_us: 118_035_834
            }
        );
        assert_eq!(both.full.total_us, 7);
        assert_eq!(pressure(""), None);
    }

    #[test]
    fn interfaces_are_read() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
                    face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    \
                    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0\n  \
                    eth0: 5 6 7 8 0 0 0 0 9 10 11 12 0 0 0 0\n";
        let interfaces = net_dev(text);
        assert_eq!(interfaces.len(), 2);
        let eth0 = &interfaces[1];
        assert_eq!(
            (eth0.name.as_str(), eth0.rx_bytes, eth0.rx_dropped),
            ("eth0", 5, 8)
        );
        assert_eq!(
            (eth0.tx_bytes, eth0.tx_packets, eth0.tx_errors, eth0.tx_dropped),
            (9, 10, 11, 12)
        );
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "[a-z0-9=:. \n]{0,200}") {
            let _ = (number(&text), limit(&text), limit_v1(&text), pressure(&text));
            prop_assert!(keyed(&text).count() <= text.lines().count());
            prop_assert!(io_stat(&text).len() <= text.lines().count());
            prop_assert!(net_dev(&text).len() <= text.lines().count());
            blkio(&text, &mut Vec::new(), |io| (&mut io.read_bytes, &mut io.write_bytes));
        }

        #[test]
        fn keyed_files_are_read_back(pairs in proptest::collection::vec(("[a-z_]{1,20}", any::<u64>()), 0..20)) {
            let text: String = pairs.iter().map(|(key, value)| format!("{key} {value}\n")).collect();
            let read: Vec<_> = keyed(&text).map(|(key, value)| (key.to_owned(), value)).collect();
            prop_assert_eq!(read, pairs);
        }

        #[test]
        fn io_is_read_back(major: u32, minor: u32, read: u64, write: u64, reads: u64, writes: u64) {
            let text = format!("{major}:{minor} rbytes={read} wbytes={write} rios={reads} wios={writes} dios=1\n");
            let expected = IoDevice {
                major, minor, read_bytes: read, write_bytes: write, read_operations: reads, write_operations: writes,
            };
            prop_assert_eq!(io_stat(&text), vec![expected]);
        }

        #[test]
        fn pressure_is_read_back(avg in 0u32..10_000, total: u64) {
            let share = f64::from(avg) / 100.0;
            let text = format!("some avg10={share:.2} avg60=0.00 avg300=0.00 total={total}\n");
            let read = pressure(&text).unwrap();
            prop_assert_eq!((read.some.avg10, read.some.total_us), (share, total));
        }

        #[test]
        fn interfaces_are_read_back(name in "[a-z0-9.-]{1,15}", rx: u64, tx: u64) {
            let text = format!("head\nhead\n {name}: {rx} 0 0 0 0 0 0 0 {tx} 0 0 0 0 0 0 0\n");
            let read = net_dev(&text);
            prop_assert_eq!((read[0].name.as_str(), read[0].rx_bytes, read[0].tx_bytes), (name.as_str(), rx, tx));
        }
    }
}
