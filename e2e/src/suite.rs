//! Runs test cases against a node they share, each under one runtime handler, and prints as libtest does.
//! A suite of its own, because libtest has nowhere to stop the daemon and to look for leaks after the last
//! test, and no way to run one body under several handlers.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::case::Case;
use crate::daemon::Flavour;
use crate::node::{Node, Options};

/// A runtime handler that cases are run under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handler {
    /// Linux namespaces.
    Runc,
    /// A virtual machine.
    Runv,
}

impl Handler {
    /// Its name in RunPodSandbox.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Runv => "runv",
        }
    }
}

/// Ends a case as skipped; the reason is printed and counted.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Skip(pub String);

type Body = fn(&Case<'_>) -> Result<()>;

struct Entry {
    name: String,
    handler: Handler,
    body: Body,
}

/// A named list of cases.
pub struct Suite {
    options: fn() -> Result<Options>,
    entries: Vec<Entry>,
    serial: bool,
}

enum Outcome {
    Passed,
    Failed(String),
    Skipped(String),
}

impl Suite {
    /// A suite whose node is started with these options.
    #[must_use]
    pub fn new(options: fn() -> Result<Options>) -> Self {
        Self {
            options,
            entries: Vec::new(),
            serial: false,
        }
    }

    /// One case at a time: for suites that kill the daemon.
    #[must_use]
    pub fn serial(mut self) -> Self {
        self.serial = true;
        self
    }

    /// Adds a case that is run under both handlers.
    #[must_use]
    pub fn both(self, name: &str, body: Body) -> Self {
        self.one(Handler::Runc, name, body).one(Handler::Runv, name, body)
    }

    /// Adds a case that only concerns one handler.
    #[must_use]
    pub fn one(mut self, handler: Handler, name: &str, body: Body) -> Self {
        self.entries.push(Entry {
            name: format!("{name}::{}", handler.name()),
            handler,
            body,
        });
        self
    }

    /// Runs what the command line asks for: words are filters on names, as with libtest.
    #[must_use]
    pub fn main(self) -> ExitCode {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let exact = arguments.iter().any(|a| a == "--exact");
        let filters: Vec<&String> = arguments.iter().filter(|a| !a.starts_with('-')).collect();
        let wanted = |name: &str| {
            filters.is_empty()
                || filters
                    .iter()
                    .any(|f| if exact { name == **f } else { name.contains(*f) })
        };
        let entries: Vec<Entry> = self.entries.into_iter().filter(|e| wanted(&e.name)).collect();
        if arguments.iter().any(|a| a == "--list") {
            for entry in &entries {
                println!("{}: test", entry.name);
            }
            return ExitCode::SUCCESS;
        }
        let flavour = match Flavour::from_environment() {
            Ok(flavour) => flavour,
            Err(error) => {
                eprintln!("{error:#}");
                return ExitCode::FAILURE;
            }
        };
        let jobs = if self.serial { 1 } else { jobs() };
        run(flavour, self.options, entries, jobs)
    }
}

/// Cases at a time: `E2E_JOBS`, else 2, since most of a case is waiting.
fn jobs() -> usize {
    std::env::var("E2E_JOBS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(2usize)
        .max(1)
}

fn run(flavour: Flavour, options: fn() -> Result<Options>, entries: Vec<Entry>, jobs: usize) -> ExitCode {
    let start = Instant::now();
    println!(
        "\nrunning {} tests",
        entries.len() + usize::from(!entries.is_empty())
    );
    let shared: Mutex<Option<Started>> = Mutex::new(None);
    let ended: Mutex<Vec<(String, Outcome)>> = Mutex::new(Vec::new());
    let record = |name: String, outcome: Outcome, took: Duration| {
        let mut ended = ended.lock().unwrap_or_else(PoisonError::into_inner);
        let seconds = took.as_secs_f32();
        match &outcome {
            Outcome::Passed => println!("test {name} ... ok ({seconds:.1} s)"),
            Outcome::Failed(_) => println!("test {name} ... FAILED ({seconds:.1} s)"),
            Outcome::Skipped(reason) => println!("test {name} ... ignored, {reason}"),
        }
        ended.push((name, outcome));
    };
    let any = !entries.is_empty();
    let queue = Mutex::new(VecDeque::from(entries));
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(entry) = next else { break };
                    let begun = Instant::now();
                    let node = shared
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .get_or_insert_with(|| start_node(flavour, options))
                        .clone();
                    let outcome = run_one(flavour, &node, &entry);
                    if jobs == 1 && node.is_ok() && matches!(outcome, Outcome::Failed(_)) {
                        // What a failed case left must not fail the next one: it gets a new node.
                        *shared.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    }
                    record(entry.name, outcome, begun.elapsed());
                }
            });
        }
    });
    if any {
        let begun = Instant::now();
        let node = shared.into_inner().unwrap_or_else(PoisonError::into_inner);
        let outcome = match node {
            Some(Ok(node)) => match Arc::into_inner(node).map(Node::finish) {
                Some(Ok(())) => Outcome::Passed,
                Some(Err(error)) => Outcome::Failed(format!("{error:#}")),
                None => Outcome::Failed("a case still holds the node".to_owned()),
            },
            Some(Err(error)) => Outcome::Failed(error),
            None => Outcome::Skipped("the last case failed, and its node with it".to_owned()),
        };
        record("nothing_is_left_behind".to_owned(), outcome, begun.elapsed());
    }
    summary(
        &ended.into_inner().unwrap_or_else(PoisonError::into_inner),
        start.elapsed(),
    )
}

/// The node, or why it did not start.
type Started = Result<Arc<Node>, String>;

fn start_node(flavour: Flavour, options: fn() -> Result<Options>) -> Started {
    let node = options().and_then(|options| Node::start(flavour, options));
    node.map(Arc::new).map_err(|error| format!("{error:#}"))
}

fn run_one(flavour: Flavour, node: &Started, entry: &Entry) -> Outcome {
    if flavour == Flavour::Containerd && entry.handler == Handler::Runv {
        return Outcome::Skipped("Debian's containerd has no handler runv".to_owned());
    }
    let node = match node {
        Ok(node) => node,
        Err(error) => return Outcome::Failed(format!("the node did not start: {error}")),
    };
    if let Err(error) = node.ensure_daemon() {
        return Outcome::Failed(format!("the daemon is not running and does not start: {error:#}"));
    }
    let case = Case::new(node, entry.handler, &entry.name);
    let result = catch_unwind(AssertUnwindSafe(|| (entry.body)(&case)));
    let diagnostics = node.diagnostics();
    let cleaned = case.clean_up();
    let failed = |text: String| Outcome::Failed(format!("{text}\n{diagnostics}"));
    match (result, cleaned) {
        (Ok(Ok(())), Ok(())) => Outcome::Passed,
        (Ok(Ok(())), Err(error)) => failed(format!("removing the pods afterwards: {error:#}")),
        (Ok(Err(error)), _) => match error.downcast::<Skip>() {
            Ok(skip) => Outcome::Skipped(skip.0),
            Err(error) => failed(format!("{error:#}")),
        },
        (Err(panic), _) => failed(panic_text(panic.as_ref())),
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
        .unwrap_or_else(|| "a panic without text".to_owned())
}

fn summary(ended: &[(String, Outcome)], took: Duration) -> ExitCode {
    let count = |wanted: fn(&Outcome) -> bool| ended.iter().filter(|(_, o)| wanted(o)).count();
    let failed = count(|o| matches!(o, Outcome::Failed(_)));
    if failed > 0 {
        println!("\nfailures:");
        for (name, outcome) in ended {
            if let Outcome::Failed(text) = outcome {
                println!("\n---- {name} ----\n{text}");
            }
        }
    }
    println!(
        "\ntest result: {}. {} passed; {failed} failed; {} ignored; 0 measured; 0 filtered out; finished in {:.2}s\n",
        if failed == 0 { "ok" } else { "FAILED" },
        count(|o| matches!(o, Outcome::Passed)),
        count(|o| matches!(o, Outcome::Skipped(_))),
        took.as_secs_f32()
    );
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
