//! CPU use per second (CRI `usage_nano_cores`) of containers and pods: from the last two samples that requests for
//! statistics took anyway. Nothing is read for it, and what is not asked for any more is forgotten.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// A rate is over at least this long: two requests close to each other say nothing.
const SHORTEST_NS: i64 = 1_000_000_000;
/// What was not sampled for so long is forgotten; kubelets ask every ten seconds.
const FORGET_NS: i64 = 300_000_000_000;

/// Last samples by the id of a container or pod.
#[derive(Debug, Default)]
pub struct CpuRates(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    samples: HashMap<String, Samples>,
    cleaned_ns: i64,
}

#[derive(Debug, Clone, Copy)]
struct Samples {
    /// What rates are counted from.
    base: Sample,
    last: Sample,
    rate: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    at_ns: i64,
    used_ns: u64,
}

impl CpuRates {
    /// Notes a sample, `used_ns` of CPU time until `at_ns`, and returns the nanoseconds of CPU time per second of
    /// late; `None` for the first, and where the counter began anew.
    pub fn sample(&self, id: &str, at_ns: i64, used_ns: u64) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if at_ns.saturating_sub(state.cleaned_ns) > FORGET_NS {
            state.cleaned_ns = at_ns;
            let old = at_ns.saturating_sub(FORGET_NS);
            state.samples.retain(|_, samples| samples.last.at_ns >= old);
        }
        let new = Sample { at_ns, used_ns };
        let Some(known) = state
            .samples
            .get_mut(id)
            .filter(|known| used_ns >= known.last.used_ns)
        else {
            let first = Samples {
                base: new,
                last: new,
                rate: None,
            };
            state.samples.insert(id.to_owned(), first);
            return None;
        };
        if at_ns >= known.last.at_ns {
            known.last = new;
        }
        let passed = u128::try_from(at_ns.saturating_sub(known.base.at_ns)).unwrap_or(0);
        if passed >= SHORTEST_NS as u128 {
            let used = u128::from(used_ns.saturating_sub(known.base.used_ns));
            known.rate = u64::try_from(used * 1_000_000_000 / passed).ok();
            known.base = new;
        }
        known.rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: i64 = 1_000_000_000;

    #[test]
    fn a_rate_is_that_of_the_last_two_samples() {
        let rates = CpuRates::default();
        assert_eq!(rates.sample("a", 10 * SECOND, 100), None);
        assert_eq!(rates.sample("a", 20 * SECOND, 5_000_000_100), Some(500_000_000));
        assert_eq!(rates.sample("b", 20 * SECOND, 1), None);
        // Too close: what was said stays, until it is long enough.
        assert_eq!(
            rates.sample("a", 20 * SECOND + 5, 5_000_000_100),
            Some(500_000_000)
        );
        assert_eq!(rates.sample("a", 30 * SECOND, 5_000_000_100), Some(0));
        // A counter that began anew.
        assert_eq!(rates.sample("a", 40 * SECOND, 7), None);
    }

    #[test]
    fn frequent_samples_still_give_a_rate() {
        let rates = CpuRates::default();
        let last = (0..30_u64)
            .map(|i| rates.sample("a", i as i64 * SECOND / 10, i * 50_000_000))
            .last()
            .flatten();
        assert_eq!(last, Some(500_000_000));
    }

    #[test]
    fn what_is_not_asked_for_is_forgotten() {
        let rates = CpuRates::default();
        for i in 0..1000 {
            rates.sample(&i.to_string(), SECOND, 1);
        }
        rates.sample("late", SECOND + 2 * FORGET_NS, 1);
        assert_eq!(rates.0.lock().unwrap().samples.len(), 1);
    }

    proptest! {
        #[test]
        fn any_sequence_is_taken(samples in proptest::collection::vec((any::<i64>(), any::<u64>()), 0..50)) {
            let rates = CpuRates::default();
            for (at_ns, used_ns) in samples {
                rates.sample("a", at_ns, used_ns);
            }
        }
    }
}
