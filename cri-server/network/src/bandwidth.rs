//! Bandwidth limits of a pod, from its annotations as kubelet documents them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";
/// Bits; the plugin needs a burst beside a rate, containerd and CRI-O pass the greatest 31-bit number.
const BURST: u64 = i32::MAX as u64;
/// Kubernetes refuses what is outside 1k to 1P bits per second.
const ACCEPTED: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;

/// Rates in bits per second and bursts in bits, as the capability `bandwidth` has them; 0: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// Towards the pod.
    pub ingress_rate: u64,
    /// Towards the pod.
    pub ingress_burst: u64,
    /// From the pod.
    pub egress_rate: u64,
    /// From the pod.
    pub egress_burst: u64,
}

/// The annotation has no usable rate.
#[derive(Debug, thiserror::Error)]
#[error("annotation {annotation}: {value:?} is not a rate from 1k to 1P bits per second, such as 10M")]
pub struct InvalidBandwidth {
    annotation: &'static str,
    value: String,
}

impl Bandwidth {
    /// The limits that the pod's annotations ask for; `None` where there are none.
    ///
    /// # Errors
    /// [`InvalidBandwidth`] where a rate is not a Kubernetes quantity or outside of what Kubernetes accepts.
    pub fn from_annotations(
        annotations: &BTreeMap<String, String>,
    ) -> Result<Option<Self>, InvalidBandwidth> {
        let rate = |annotation: &'static str| match annotations.get(annotation) {
            None => Ok(None),
            Some(value) => quantity(value)
                .filter(|rate| ACCEPTED.contains(rate))
                .map(Some)
                .ok_or_else(|| InvalidBandwidth {
                    annotation,
                    value: value.chars().take(80).collect(),
                }),
        };
        let (ingress, egress) = (rate(INGRESS)?, rate(EGRESS)?);
        if ingress.is_none() && egress.is_none() {
            return Ok(None);
        }
        Ok(Some(Self {
            ingress_rate: ingress.unwrap_or(0),
            ingress_burst: ingress.map_or(0, |_| BURST),
            egress_rate: egress.unwrap_or(0),
            egress_burst: egress.map_or(0, |_| BURST),
        }))
    }

    /// The plugin refuses a zero, so a direction without a limit is left out.
    pub(crate) fn to_cni(self) -> Value {
        let mut entry = json!({});
        if self.ingress_rate > 0 {
            entry["ingressRate"] = json!(self.ingress_rate);
            entry["ingressBurst"] = json!(self.ingress_burst);
        }
        if self.egress_rate > 0 {
            entry["egressRate"] = json!(self.egress_rate);
            entry["egressBurst"] = json!(self.egress_burst);
        }
        entry
    }
}

/// A Kubernetes quantity, rounded up to a whole number: digits with an optional fraction, then a decimal suffix
/// (`m`, `k`, `M`, …), a binary one (`Ki`, `Mi`, …), a decimal exponent (`e6`, `E-3`) or nothing.
fn quantity(text: &str) -> Option<u64> {
    let number_end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(number_end);
    let (binary, decimal) = match suffix {
        "n" => (0, -9),
        "u" => (0, -6),
        "m" => (0, -3),
        "" => (0, 0),
        "k" => (0, 3),
        "M" => (0, 6),
        "G" => (0, 9),
        "T" => (0, 12),
        "P" => (0, 15),
        "E" => (0, 18),
        "Ki" => (10, 0),
        "Mi" => (20, 0),
        "Gi" => (30, 0),
        "Ti" => (40, 0),
        "Pi" => (50, 0),
        "Ei" => (60, 0),
        exponent => (0, exponent.strip_prefix(['e', 'E'])?.parse::<i8>().ok()?),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || whole.len() > 18 || fraction.len() > 18 {
        return None;
    }
    let digits: u128 = format!("0{whole}{fraction}").parse().ok()?;
    let power = u32::from(decimal.unsigned_abs());
    let fraction = 10u128.pow(fraction.len().try_into().ok()?);
    let (scale, divisor) = if decimal >= 0 {
        (10u128.checked_pow(power)?, fraction)
    } else {
        (1, 10u128.checked_pow(power)?.checked_mul(fraction)?)
    };
    let scaled = digits.checked_mul(scale)?.checked_mul(1 << binary)?;
    u64::try_from(scaled.div_ceil(divisor)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn annotated(pairs: &[(&str, &str)]) -> Result<Option<Bandwidth>, InvalidBandwidth> {
        let annotations = pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        Bandwidth::from_annotations(&annotations)
    }

    #[test]
    fn rates_are_read_and_refused() {
        assert_eq!(annotated(&[]).unwrap(), None);
        let limits = annotated(&[(INGRESS, "10M"), (EGRESS, "1.5Ki")])
            .unwrap()
            .unwrap();
        assert_eq!((limits.ingress_rate, limits.egress_rate), (10_000_000, 1536));
        assert_eq!(limits.to_cni()["ingressBurst"], json!(2_147_483_647u64));
        for (text, rate) in [
            ("1e6", 1_000_000),
            ("1.5E6", 1_500_000),
            ("20e+5", 2_000_000),
            ("5000000e-3", 5000),
            ("5000000m", 5000),
        ] {
            let limits = annotated(&[(INGRESS, text)]).unwrap().unwrap();
            assert_eq!(limits.ingress_rate, rate, "{text}");
        }
        let one = annotated(&[(EGRESS, "1000")]).unwrap().unwrap();
        assert_eq!(one.to_cni(), json!({"egressRate": 1000, "egressBurst": BURST}));
        for bad in [
            "",
            "999",
            "fast",
            "-1M",
            "10m",
            "2P",
            "1.2.3M",
            ".",
            "1e2",
            "1e",
            "1ee6",
            "1e99",
            "1E",
            "99999999999999999999",
        ] {
            let error = annotated(&[(INGRESS, bad)]).unwrap_err().to_string();
            assert!(error.contains(INGRESS), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_rate_or_refused(text in ".{0,40}") {
            if let Ok(Some(limits)) = annotated(&[(INGRESS, &text)]) {
                prop_assert!(ACCEPTED.contains(&limits.ingress_rate));
            }
        }

        #[test]
        fn whole_numbers_are_exact(number in 1_000u64..1_000_000_000) {
            let limits = annotated(&[(INGRESS, &number.to_string())]).unwrap().unwrap();
            prop_assert_eq!(limits.ingress_rate, number);
        }
    }
}
