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
    /// What, subject, MiB.
    weights: Vec<(String, BTreeMap<String, f64>)>,
}

/// A first mark of the project's: what is measured, and the most that it may be.
struct Mark {
    what: &'static str,
    value: Option<f64>,
    most: f64,
}

impl Report {
    pub(crate) fn time(&mut self, step: &str, subject: &str, took: Duration) {
        let samples = row(&mut self.times, step).entry(subject.to_owned()).or_default();
        samples.push(took.as_secs_f64() * 1000.0);
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

    fn marks(&self) -> Vec<Mark> {
        let ratio = |step: &str| Some(self.median(step, OURS)? / self.median(step, PEER)?);
        let cold = self.median("RunPodSandbox", VM);
        let bare = self.median("bare QEMU boot to the agent's answer", VM);
        vec![
            Mark {
                what: "RunPodSandbox, runc, times containerd's",
                value: ratio("RunPodSandbox"),
                most: 0.6,
            },
            Mark {
                what: "MiB of a runc pod's shim",
                value: self.weight("a pod with a container", OURS),
                most: 3.0,
            },
            Mark {
                what: "MiB of the idle daemon",
                value: self.weight("idle daemon", "catamaran"),
                most: 20.0,
            },
            Mark {
                what: "RunPodSandbox, runv, times a bare boot",
                value: cold.zip(bare).map(|(cold, bare)| cold / bare),
                most: 1.3,
            },
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
        for Mark { what, value, most } in self.marks() {
            let met = value.is_some_and(|value| value <= most);
            all &= met;
            let value = value.map_or_else(|| "not measured".to_owned(), |value| format!("{value:.2}"));
            println!(
                "{what:<42} {value:>12}  at most {most}  {}",
                if met { "met" } else { "MISSED" }
            );
        }
        all
    }

    pub(crate) fn json(&self) -> Value {
        let marks: Vec<Value> = self
            .marks()
            .into_iter()
            .map(|mark| json!({"what": mark.what, "value": mark.value, "atMost": mark.most}))
            .collect();
        let times: BTreeMap<_, _> = self.times.iter().cloned().collect();
        let weights: BTreeMap<_, _> = self.weights.iter().cloned().collect();
        json!({"milliseconds": times, "mib": weights, "marks": marks})
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
        assert!(!report.print(), "what was not measured is not met");
    }
}
