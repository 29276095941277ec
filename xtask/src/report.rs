//! Reads what libtest (and the end-to-end suites, which print as libtest does) says, and counts.

/// Skips that may happen, and why.
const EXPECTED: &str = include_str!("../expected-skips.txt");
/// Its skips are judged by itself, against its own list.
const CONFORMANCE: &str = "tests/conformance.rs: critest::";

/// What a test run came to.
#[derive(Debug, Default)]
pub(crate) struct Report {
    passed: usize,
    failed: Vec<String>,
    /// Name and reason.
    skipped: Vec<(String, String)>,
    /// The current test binary, as cargo names it.
    binary: String,
    /// Between `failures:` and `test result`: what is shown in full.
    in_failures: bool,
}

impl Report {
    /// Takes in a line; prints those that a reader wants to see at once.
    pub(crate) fn line(&mut self, line: &str) {
        let trimmed = line.trim();
        if let Some(running) = trimmed
            .strip_prefix("Running ")
            .or_else(|| trimmed.strip_prefix("Doc-tests "))
        {
            running
                .split(" (")
                .next()
                .unwrap_or(running)
                .clone_into(&mut self.binary);
            self.in_failures = false;
        } else if let Some((name, outcome)) = result(line) {
            self.outcome(name, outcome);
        } else if let Some((name, reason)) =
            trimmed.strip_prefix("skipped: ").and_then(|r| r.split_once(": "))
        {
            // A test that cannot run here says so and returns; libtest takes that for a pass.
            let name = format!("{}: {name}", self.binary);
            if !self.skipped.iter().any(|(known, _)| *known == name) {
                self.passed = self.passed.saturating_sub(1);
                self.skips(name, reason);
            }
        } else if line.starts_with("test result:") {
            self.in_failures = false;
            println!("   {}: {}", self.binary, &line["test result: ".len()..]);
        } else if line == "failures:" {
            self.in_failures = true;
        }
        if self.in_failures {
            println!("   | {line}");
        }
    }

    fn outcome(&mut self, name: &str, outcome: &str) {
        let name = format!("{}: {name}", self.binary);
        if outcome == "ok" || outcome.starts_with("ok ") {
            self.passed += 1;
        } else if let Some(reason) = outcome.strip_prefix("ignored") {
            let reason = reason.trim_start_matches([',', ' ']);
            let reason = if reason.is_empty() {
                "no reason is given"
            } else {
                reason
            };
            self.skips(name, reason);
        } else {
            println!("   FAILED {name}");
            self.failed.push(name);
        }
    }

    fn skips(&mut self, name: String, reason: &str) {
        let expected = EXPECTED
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.split_once(" | "))
            .any(|(known, _)| known == name);
        if expected || name.starts_with(CONFORMANCE) {
            self.skipped.push((name, reason.to_owned()));
        } else {
            println!("   FAILED {name}: skipped, but not in xtask/expected-skips.txt: {reason}");
            self.failed.push(format!("{name}: skipped: {reason}"));
        }
    }

    /// Counts a check that is no test of libtest's.
    pub(crate) fn check(&mut self, name: &str, passed: bool) {
        if passed {
            self.passed += 1
        } else {
            self.failed.push(name.to_owned())
        }
    }

    /// Counts a check that cannot be made here.
    pub(crate) fn skip(&mut self, name: &str, reason: &str) {
        self.skipped.push((name.to_owned(), reason.to_owned()));
    }

    /// How many failures are known.
    pub(crate) fn failures(&self) -> usize {
        self.failed.len()
    }

    /// Prints names of what failed and was skipped, and the totals as the last line.
    pub(crate) fn print(&self) {
        println!();
        for (name, reason) in &self.skipped {
            println!("skipped: {name}: {reason}");
        }
        for name in &self.failed {
            println!("failed: {name}");
        }
        println!(
            "{} passed, {} failed, {} skipped",
            self.passed,
            self.failed.len(),
            self.skipped.len()
        );
    }
}

/// The name and outcome of a libtest line `test NAME ... OUTCOME`.
fn result(line: &str) -> Option<(&str, &str)> {
    let (name, outcome) = line.strip_prefix("test ")?.split_once(" ... ")?;
    // `(line 12) - should panic` and the like belong to the name.
    Some((name.trim(), outcome.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_failures_and_skips_are_told_apart() {
        let mut report = Report::default();
        for line in [
            "     Running tests/real_plugins.rs (target/release/deps/a-1)",
            "test one ... ok",
            "test two ... ok (1.5 s)",
            "test three ... FAILED",
            "     Running tests/conformance.rs (target/release/deps/b-1)",
            "test critest::four ... ignored, needs AppArmor",
            "     Running tests/failing_plugins.rs (target/release/deps/c-1)",
            "test attach_until_killed ... ignored, started by another",
            "test result: FAILED. 3 passed; 1 failed; 1 ignored",
        ] {
            report.line(line);
        }
        assert_eq!((report.passed, report.failures()), (2, 1));
        assert_eq!(
            report.skipped,
            [
                (
                    "tests/conformance.rs: critest::four".into(),
                    "needs AppArmor".into()
                ),
                (
                    "tests/failing_plugins.rs: attach_until_killed".into(),
                    "started by another".into()
                ),
            ]
        );
    }

    #[test]
    fn a_skip_that_nobody_expects_is_a_failure() {
        let mut report = Report::default();
        for line in [
            "     Running unittests src/main.rs (target/release/deps/a-1)",
            "test the_kernel_takes_the_program ... ok",
            "test five ... ok",
            "test six ... ignored",
            "skipped: the_kernel_takes_the_program: no permission to load eBPF programs",
            "skipped: five: needs iputils-ping",
        ] {
            report.line(line);
        }
        assert_eq!((report.passed, report.skipped.len()), (0, 1));
        assert_eq!(
            report.failed,
            [
                "unittests src/main.rs: six: skipped: no reason is given",
                "unittests src/main.rs: five: skipped: needs iputils-ping"
            ]
        );
    }
}
