//! Medians, ratios, marks: as a table and as JSON.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

const OURS: &str = "catamaran runc";
const PEER: &str = "containerd runc";
const VM: &str = "catamaran runv";

/// What was measured, in the order in which it was.
#[derive(Default)]
pub(crate) struct Report {
    /// Step, subject, milliseconds.
    times: Vec<(String, BTreeMap<String, Vec<f64>>)>,
    /// What, subject, so much in a second.
    rates: Vec<(String, BTreeMap<String, Vec<f64>>)>,
    /// What, subject, MiB.
    weights: Vec<(String, BTreeMap<String, f64>)>,
}

/// A mark of the project's: what is measured, and what it shall be.
struct Mark {
    what: &'static str,
    value: Option<f64>,
    bound: Bound,
}

#[derive(Clone, Copy)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

impl Bound {
    fn met_by(self, value: f64) -> bool {
        match self {
            Self::AtMost(most) => value <= most,
            Self::AtLeast(least) => value >= least,
        }
    }
}

impl Report {
    pub(crate) fn time(&mut self, step: &str, subject: &str, took: Duration) {
        let samples = row(&mut self.times, step).entry(subject.to_owned()).or_default();
        samples.push(took.as_secs_f64() * 1000.0);
    }

    pub(crate) fn rate(&mut self, what: &str, subject: &str, per_second: f64) {
        let samples = row(&mut self.rates, what).entry(subject.to_owned()).or_default();
        samples.push(per_second);
    }

    pub(crate) fn weigh(&mut self, what: &str, subject: &str, mib: f64) {
        row(&mut self.weights, what).insert(subject.to_owned(), mib);
    }

    fn median(&self, step: &str, subject: &str) -> Option<f64> {
        let (_, row) = self.times.iter().find(|(name, _)| name == step)?;
        row.get(subject).map(|samples| quantile(samples, 0.5))
    }

    fn weight(&self, what: &str, subject: &str) -> Option<f64> {
        self.weights
            .iter()
            .find(|(name, _)| name == what)?
            .1
            .get(subject)
            .copied()
    }

    fn rate_of(&self, what: &str, subject: &str) -> Option<f64> {
        let (_, row) = self.rates.iter().find(|(name, _)| name == what)?;
        row.get(subject).map(|samples| mean(samples))
    }

    fn marks(&self) -> Vec<Mark> {
        let ratio = |step: &str| Some(self.median(step, OURS)? / self.median(step, PEER)?);
        let weight = |what: &str| Some(self.weight(what, OURS)? / self.weight(what, PEER)?);
        let rate = |what: &str| Some(self.rate_of(what, OURS)? / self.rate_of(what, PEER)?);
        let cold = self.median("RunPodSandbox", VM);
        let bare = self.median("bare QEMU boot to the agent's answer", VM);
        let most = |what, value, most| Mark {
            what,
            value,
            bound: Bound::AtMost(most),
        };
        vec![
            most(
                "RunPodSandbox, runc, times containerd's",
                ratio("RunPodSandbox"),
                0.45,
            ),
            most(
                "Create + Start, runc, times containerd's",
                ratio("CreateContainer + StartContainer"),
                0.7,
            ),
            most("ExecSync, runc, times containerd's", ratio("ExecSync"), 0.6),
            most(
                "Stop + Remove, runc, times containerd's",
                ratio("StopPodSandbox + RemovePodSandbox"),
                0.5,
            ),
            most(
                "statistics of 100, times containerd's",
                ratio("statistics of 100 containers"),
                0.05,
            ),
            Mark {
                what: "pods per s by 8 workers, times containerd's",
                value: rate("pods started by 8 workers, per s"),
                bound: Bound::AtLeast(2.0),
            },
            most(
                "memory of a pod, times containerd's",
                weight("a pod with a container"),
                0.4,
            ),
            most(
                "MiB of a runc pod's shim",
                self.weight("a pod with a container", OURS),
                3.0,
            ),
            most(
                "MiB of the idle daemon",
                self.weight("idle daemon", "catamaran"),
                20.0,
            ),
            most(
                "RunPodSandbox, runv, times a bare boot",
                cold.zip(bare).map(|(cold, bare)| cold / bare),
                1.3,
            ),
        ]
    }

    /// Prints everything; whether all marks are met.
    pub(crate) fn print(&self) -> bool {
        println!("\nmilliseconds, median (90th percentile)");
        println!("{:<38} {:>18} {:>18} {:>7} {:>18}", "", OURS, PEER, "ratio", VM);
        for (step, row) in &self.times {
            let cell = |subject: &str| {
                row.get(subject).map_or_else(String::new, |samples| {
                    format!("{:.1} ({:.1})", quantile(samples, 0.5), quantile(samples, 0.9))
                })
            };
            let ratio = self.median(step, OURS).zip(self.median(step, PEER));
            let ratio = ratio.map_or_else(String::new, |(ours, peer)| format!("{:.2}", ours / peer));
            println!(
                "{step:<38} {:>18} {:>18} {ratio:>7} {:>18}",
                cell(OURS),
                cell(PEER),
                cell(VM)
            );
        }
        println!("\nper second, mean");
        for (what, row) in &self.rates {
            let cell = |subject: &str| {
                row.get(subject)
                    .map_or_else(String::new, |samples| format!("{:.1}", mean(samples)))
            };
            let ratio = self.rate_of(what, OURS).zip(self.rate_of(what, PEER));
            let ratio = ratio.map_or_else(String::new, |(ours, peer)| format!("{:.2}", ours / peer));
            println!("{what:<38} {:>18} {:>18} {ratio:>7}", cell(OURS), cell(PEER));
        }
        println!("\nMiB, proportional set size");
        for (what, row) in &self.weights {
            let cells: Vec<String> = row
                .iter()
                .map(|(subject, mib)| format!("{subject} {mib:.2}"))
                .collect();
            println!("{what:<38} {}", cells.join("   "));
        }
        println!("\nmarks");
        let mut all = true;
        for Mark { what, value, bound } in self.marks() {
            let met = value.is_some_and(|value| bound.met_by(value));
            all &= met;
            let value = value.map_or_else(|| "not measured".to_owned(), |value| format!("{value:.2}"));
            let bound = match bound {
                Bound::AtMost(most) => format!("at most {most}"),
                Bound::AtLeast(least) => format!("at least {least}"),
            };
            println!(
                "{what:<44} {value:>12}  {bound:<13} {}",
                if met { "met" } else { "MISSED" }
            );
        }
        all
    }

    pub(crate) fn json(&self) -> Value {
        let marks: Vec<Value> = self
            .marks()
            .into_iter()
            .map(|mark| match mark.bound {
                Bound::AtMost(most) => json!({"what": mark.what, "value": mark.value, "atMost": most}),
                Bound::AtLeast(least) => json!({"what": mark.what, "value": mark.value, "atLeast": least}),
            })
            .collect();
        let times: BTreeMap<_, _> = self.times.iter().cloned().collect();
        let rates: BTreeMap<_, _> = self.rates.iter().cloned().collect();
        let weights: BTreeMap<_, _> = self.weights.iter().cloned().collect();
        json!({"milliseconds": times, "perSecond": rates, "mib": weights, "marks": marks})
    }
}

fn row<'a, T: Default>(rows: &'a mut Vec<(String, T)>, name: &str) -> &'a mut T {
    let at = rows
        .iter()
        .position(|(known, _)| known == name)
        .unwrap_or_else(|| {
            rows.push((name.to_owned(), T::default()));
            rows.len() - 1
        });
    &mut rows[at].1
}

fn mean(samples: &[f64]) -> f64 {
    samples.iter().sum::<f64>() / samples.len() as f64
}

fn quantile(samples: &[f64], part: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (part * (sorted.len().saturating_sub(1)) as f64).round() as usize;
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios() {
        let mut report = Report::default();
        for (ours, peer) in [(10, 20), (30, 60), (20, 40)] {
            report.time("RunPodSandbox", OURS, Duration::from_millis(ours));
            report.time("RunPodSandbox", PEER, Duration::from_millis(peer));
        }
        assert_eq!(report.median("RunPodSandbox", OURS), Some(20.0));
        assert_eq!(report.marks()[0].value, Some(0.5));
        assert_eq!(report.marks()[1].value, None);
        report.rate("pods started by 8 workers, per s", OURS, 30.0);
        report.rate("pods started by 8 workers, per s", OURS, 50.0);
        report.rate("pods started by 8 workers, per s", PEER, 10.0);
        let pods = &report.marks()[5];
        assert!(pods.value == Some(4.0) && pods.bound.met_by(4.0) && !pods.bound.met_by(1.9));
        assert!(!report.print(), "what was not measured is not met");
    }
}
