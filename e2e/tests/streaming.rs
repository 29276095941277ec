//! exec, attach and port-forward through the daemon, by the real crictl over SPDY and over WebSocket: the same
//! under both handlers.

use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use catamaran_e2e::case::Case;
use catamaran_e2e::http;
use catamaran_e2e::node::Options;
use catamaran_e2e::process::{self, Service};
use catamaran_e2e::registry::free_port;
use catamaran_e2e::suite::Suite;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);
const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];

fn main() -> ExitCode {
    Suite::new(|| Ok(Options::default()))
        .both("exec_carries_input_both_outputs_and_the_exit_code", exec)
        .both("exec_in_a_terminal_knows_its_size", terminal)
        .both("attach_carries_input_and_output", attach)
        .both("port_forward_reaches_both_loopback_addresses", port_forward)
        .main()
}

fn exec(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let id = t.start(&pod, &t.idle("main"))?;
    // More than any buffer on the way, and not all alike.
    let input: String = (0..100_000).map(|number| format!("line {number}\n")).collect();
    for transport in TRANSPORTS {
        let script = "cat; echo to-stderr >&2; exit 7";
        let words = ["exec", "-i", "-r", transport, &id, "sh", "-c", script];
        let output = process::feed(&mut t.node.crictl.command(&words), input.as_bytes(), LIMIT)?;
        let (said, errors) = (&output.stdout, &output.stderr);
        ensure!(
            *said == input,
            "{transport}: {} bytes went in and {} came out: {errors}",
            input.len(),
            said.len()
        );
        ensure!(
            errors.contains("to-stderr\n") && !said.contains("to-stderr"),
            "{transport}: {errors}"
        );
        ensure!(
            output.code != 0 && errors.contains("exit code 7"),
            "{transport}: {} {errors}",
            output.code
        );
        // Without input the command sees its end at once.
        let words = ["exec", "-r", transport, &id, "sh", "-c", "cat; echo done"];
        let done = t.node.crictl.ok(&words)?;
        ensure!(done == "done", "{transport}: {done:?}");
    }
    Ok(())
}

fn terminal(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let id = t.start(&pod, &t.idle("main"))?;
    // The size is told beside the start.
    let inside = "tty; n=0; until [ \"$(stty size)\" = \"31 97\" ] || [ $n = 50 ]; do n=$((n + 1)); sleep 0.1; done; \
                  stty size; read word; echo read-$word";
    for transport in TRANSPORTS {
        let crictl = t
            .node
            .crictl
            .command(&["exec", "-i", "-t", "-r", transport, &id, "sh", "-c"]);
        // script(1) gives crictl a terminal, whose size is set before crictl asks for it.
        let mut command = Command::new("script");
        command
            .args([
                "-q",
                "-e",
                "-c",
                "stty rows 31 cols 97; exec $CRICTL \"$INSIDE\"",
                "/dev/null",
            ])
            .env("CRICTL", words(&crictl))
            .env("INSIDE", inside);
        let output = process::feed(&mut command, b"typed\n", LIMIT)?;
        let said = &output.stdout;
        for word in ["/dev/pts/", "31 97", "read-typed"] {
            ensure!(said.contains(word), "{transport}: {word} is not in {output:?}");
        }
        ensure!(output.code == 0, "{transport}: {output:?}");
    }
    Ok(())
}

/// A command as a line of words, none of which has a space.
fn words(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}

fn attach(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    for transport in TRANSPORTS {
        let script = "while read line; do echo out-$line; echo err-$line >&2; done; echo end-of-input";
        let request = t
            .script(transport, script)
            .set("/stdin", json!(true))
            .set("/stdin_once", json!(true));
        let id = t.start(&pod, &request)?;
        let words = ["attach", "-i", "-r", transport, &id];
        let output = process::feed(&mut t.node.crictl.command(&words), b"one\ntwo\n", LIMIT)?;
        for line in ["out-one\n", "out-two\n"] {
            ensure!(output.stdout.contains(line), "{transport}: {output:?}");
        }
        ensure!(
            output.stderr.contains("err-two\n") && !output.stdout.contains("err-"),
            "{transport}: {output:?}"
        );
        // The end of the one client's input is the container's.
        let ended = t.wait_exited(&id)?;
        ensure!(ended.code() == 0, "{transport}: {}", ended.status);
        for line in [
            "out-one\n",
            "err-one\n",
            "out-two\n",
            "err-two\n",
            "end-of-input\n",
        ] {
            ensure!(
                ended.logs.contains(line),
                "{transport}: {line:?} is not in {}",
                ended.logs
            );
        }
    }
    Ok(())
}

fn port_forward(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let script = "mkdir /w; seq 200000 > /w/index.html; httpd -p 127.0.0.1:8081 -h /w; httpd -p '[::1]:8082' -h /w; \
                  trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done";
    let id = t.start(&pod, &t.script("main", script))?;
    let expected: String = (1..=200_000).map(|number| format!("{number}\n")).collect();
    // Whether both listen is seen from inside, so that what fails later is the forwarding.
    t.eventually(Duration::from_secs(20), || {
        t.fetch_inside(&id, "127.0.0.1", 8081).map(drop)
    })?;
    t.eventually(Duration::from_secs(20), || {
        t.fetch_inside(&id, "::1", 8082).map(drop)
    })?;
    for transport in TRANSPORTS {
        for inside in [8081, 8082] {
            let local = free_port()?;
            let ports = format!("{}:{inside}", local.port());
            let words = ["port-forward", "-r", transport, &pod.id, &ports];
            let log = t.directory()?.join(format!("forward-{transport}-{inside}"));
            let mut forward = Service::start(&mut t.node.crictl.command(&words), &log)?;
            forward.wait_until("listening port", LIMIT, || {
                std::fs::read_to_string(&log).is_ok_and(|text| text.contains("Forwarding from"))
            })?;
            for _ in 0..3 {
                let answer = http::request(local, "GET", "/", &[], &[])
                    .with_context(|| format!("{transport} {inside}: {}", process::tail(&log, 20)))?;
                ensure!(
                    answer.status == 200 && answer.body == expected.as_bytes(),
                    "{transport} {inside}: {} with {} bytes of {}",
                    answer.status,
                    answer.body.len(),
                    expected.len()
                );
            }
        }
    }
    Ok(())
}
