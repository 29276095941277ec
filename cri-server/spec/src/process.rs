//! The process of a container and of an exec: command line, environment, working directory, terminal.

use std::path::PathBuf;

use catamaran_cri_api::v1::{ContainerConfig, PodSandboxConfig};
use oci_spec::image::Config as ImageConfig;
use oci_spec::runtime::{Process, Spec, User};

use crate::capabilities::capabilities;
use crate::error::{Result, SpecError};
use crate::host::HostFeatures;
use crate::identity::{Identity, resolve_identity};
use crate::input::ContainerInput;
use crate::lsm;
use crate::resources::oom_score_adj;

/// `PATH` of a process for which neither image nor container sets one.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The container's first process. `kernel` is the one that it runs on.
pub(crate) fn container_process(input: &ContainerInput<'_>, kernel: &HostFeatures) -> Result<Process> {
    let container = input.container;
    let security = container
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    let empty = ImageConfig::default();
    let image = input.image.config().as_ref().unwrap_or(&empty);

    let identity = resolve_identity(security, image.user().as_deref().unwrap_or(""), input.users)?;
    let mut process = Process::default();
    process
        .set_terminal(Some(container.tty))
        .set_console_size(None)
        .set_user(user(&identity))
        .set_args(Some(args(container, image)?))
        .set_env(Some(environment(container, input.pod, image, &kernel.hostname)?))
        .set_cwd(working_directory(container, image)?)
        .set_capabilities(Some(capabilities(security, &kernel.capabilities)?))
        .set_rlimits(None)
        .set_no_new_privileges(Some(security.is_some_and(|security| security.no_new_privs)))
        .set_apparmor_profile(lsm::apparmor_profile(security, &kernel.apparmor)?)
        .set_oom_score_adj(oom_score_adj(container, kernel)?)
        .set_selinux_label(lsm::selinux_labels(input, kernel)?.map(|labels| labels.process));
    Ok(process)
}

fn user(identity: &Identity) -> User {
    let mut user = User::default();
    user.set_uid(identity.uid)
        .set_gid(identity.gid)
        .set_additional_gids(Some(identity.groups.clone()));
    user
}

/// The process of Exec and ExecSync in a container that was made by `spec`: the container's own with another
/// command and terminal.
///
/// # Errors
/// The command is empty or has a NUL byte.
pub fn exec_process(spec: &Spec, command: &[String], tty: bool) -> Result<Process> {
    if command.is_empty() {
        return Err(SpecError::invalid("cmd", "empty"));
    }
    for (index, word) in command.iter().enumerate() {
        no_nul(word, || format!("cmd[{index}]"))?;
    }
    let mut process = spec.process().clone().unwrap_or_default();
    process.set_args(Some(command.to_vec())).set_terminal(Some(tty));
    if tty {
        let env = process.env_mut().get_or_insert_default();
        if !env.iter().any(|pair| pair.starts_with("TERM=")) {
            env.push("TERM=xterm".into());
        }
    }
    Ok(process)
}

pub(crate) fn no_nul(text: &str, field: impl FnOnce() -> String) -> Result<()> {
    if text.contains('\0') {
        Err(SpecError::invalid(field(), "contains a NUL byte"))
    } else {
        Ok(())
    }
}

/// Kubernetes: `command` replaces the image's entrypoint and with it the image's command; `args` replaces the
/// image's command.
fn args(container: &ContainerConfig, image: &ImageConfig) -> Result<Vec<String>> {
    let mut words = container.command.clone();
    if words.is_empty() {
        let entrypoint = image.entrypoint().clone().unwrap_or_default();
        // A single empty word is how a build resets an inherited entrypoint.
        if entrypoint != [""] {
            words = entrypoint;
        }
        if container.args.is_empty() {
            words.extend(image.cmd().iter().flatten().cloned());
        }
    }
    words.extend(container.args.iter().cloned());
    if words.is_empty() {
        return Err(SpecError::invalid(
            "command",
            "neither the container nor the image says what to run",
        ));
    }
    for word in &words {
        no_nul(word, || "command".into())?;
    }
    Ok(words)
}

fn working_directory(container: &ContainerConfig, image: &ImageConfig) -> Result<PathBuf> {
    let wanted = container.working_dir.as_str();
    no_nul(wanted, || "working_dir".into())?;
    if !wanted.is_empty() {
        return if wanted.starts_with('/') {
            Ok(PathBuf::from(wanted))
        } else {
            Err(SpecError::invalid(
                "working_dir",
                format!("{wanted:?} is not an absolute path"),
            ))
        };
    }
    let of_image = image.working_dir().as_deref().unwrap_or("");
    no_nul(of_image, || "image config.WorkingDir".into())?;
    Ok(PathBuf::from("/").join(of_image))
}

/// Later settings of a name replace earlier ones and keep their place.
struct Environment(Vec<(String, String)>);

impl Environment {
    fn set(&mut self, name: &str, value: &str) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => value.clone_into(old),
            None => self.0.push((name.to_owned(), value.to_owned())),
        }
    }
}

fn environment(
    container: &ContainerConfig,
    pod: &PodSandboxConfig,
    image: &ImageConfig,
    node: &str,
) -> Result<Vec<String>> {
    let mut env = Environment(Vec::new());
    env.set("PATH", DEFAULT_PATH);
    if container.tty {
        env.set("TERM", "xterm");
    }
    env.set(
        "HOSTNAME",
        if pod.hostname.is_empty() {
            node
        } else {
            &pod.hostname
        },
    );
    for pair in image.env().iter().flatten() {
        no_nul(pair, || "image config.Env".into())?;
        match pair.split_once('=') {
            Some((name, value)) if !name.is_empty() => env.set(name, value),
            Some(_) => {}
            // A name alone takes the variable away.
            None => env.0.retain(|(name, _)| name != pair),
        }
    }
    for (index, pair) in container.envs.iter().enumerate() {
        let name = pair.key.as_str();
        if name.is_empty() || name.contains('=') || name.contains('\0') {
            let reason = format!("{name:?} is not the name of an environment variable");
            return Err(SpecError::invalid(format!("envs[{index}].key"), reason));
        }
        let value = text(&pair.value).ok_or_else(|| {
            SpecError::invalid(
                format!("envs[{index}].value"),
                "not UTF-8, which a spec cannot hold",
            )
        })?;
        no_nul(value, || format!("envs[{index}].value"))?;
        env.set(name, value);
    }
    Ok(env
        .0
        .into_iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect())
}

/// KeyValue.value is a string in older versions of the CRI and bytes in newer ones.
fn text(value: &(impl AsRef<[u8]> + ?Sized)) -> Option<&str> {
    std::str::from_utf8(value.as_ref()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use catamaran_cri_api::v1::KeyValue;
    use oci_spec::image::ConfigBuilder;

    fn words(list: &[&str]) -> Vec<String> {
        list.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn command_line() {
        type Case<'a> = (
            &'a [&'a str],
            &'a [&'a str],
            &'a [&'a str],
            &'a [&'a str],
            &'a [&'a str],
        );
        // command, args, entrypoint, cmd, expected
        let cases: &[Case<'_>] = &[
            (&[], &[], &["e"], &["c"], &["e", "c"]),
            (&["x"], &[], &["e"], &["c"], &["x"]),
            (&[], &["a"], &["e"], &["c"], &["e", "a"]),
            (&["x"], &["a"], &["e"], &["c"], &["x", "a"]),
            (&[], &[], &[""], &["c"], &["c"]),
            (&[], &["a"], &[], &["c"], &["a"]),
            (&[], &[], &["e"], &[], &["e"]),
        ];
        for (command, args_, entrypoint, cmd, expected) in cases {
            let container = ContainerConfig {
                command: words(command),
                args: words(args_),
                ..ContainerConfig::default()
            };
            let image = ConfigBuilder::default()
                .entrypoint(words(entrypoint))
                .cmd(words(cmd))
                .build()
                .expect("config");
            assert_eq!(args(&container, &image).expect("some"), words(expected));
        }
        let error = args(&ContainerConfig::default(), &ImageConfig::default()).expect_err("nothing to run");
        assert_eq!(error.field, "command");
        let nul = ContainerConfig {
            command: words(&["a\0b"]),
            ..ContainerConfig::default()
        };
        assert!(args(&nul, &ImageConfig::default()).is_err());
    }

    #[test]
    fn environment_of_image_and_container() {
        let image = ConfigBuilder::default()
            .env(words(&["A=1", "B=2", "PATH=/p", "TERM", "=x", "C=a=b"]))
            .build()
            .expect("config");
        let pair = |key: &str, value: &str| KeyValue {
            key: key.into(),
            value: value.into(),
        };
        let container = ContainerConfig {
            envs: vec![pair("B", "3"), pair("D", "")],
            tty: true,
            ..Default::default()
        };
        let pod = PodSandboxConfig {
            hostname: "pod".into(),
            ..Default::default()
        };
        let env = environment(&container, &pod, &image, "node").expect("ok");
        assert_eq!(env, ["PATH=/p", "HOSTNAME=pod", "A=1", "B=3", "C=a=b", "D="]);

        let plain = environment(
            &ContainerConfig {
                tty: true,
                ..Default::default()
            },
            &PodSandboxConfig::default(),
            &ImageConfig::default(),
            "node",
        );
        assert_eq!(
            plain.expect("ok"),
            [
                format!("PATH={DEFAULT_PATH}"),
                "TERM=xterm".into(),
                "HOSTNAME=node".into()
            ]
        );

        for key in ["", "A=B", "A\0"] {
            let container = ContainerConfig {
                envs: vec![pair("ok", ""), pair(key, "v")],
                ..Default::default()
            };
            let error = environment(&container, &pod, &image, "").expect_err(key);
            assert_eq!(error.field, "envs[1].key");
        }
    }

    #[test]
    fn cwd() {
        let image = ConfigBuilder::default()
            .working_dir("srv")
            .build()
            .expect("config");
        let of = |dir: &str| {
            working_directory(
                &ContainerConfig {
                    working_dir: dir.into(),
                    ..Default::default()
                },
                &image,
            )
        };
        assert_eq!(of(""), Ok("/srv".into()));
        assert_eq!(of("/w"), Ok("/w".into()));
        assert_eq!(of("w").expect_err("relative").field, "working_dir");
        assert_eq!(
            working_directory(&ContainerConfig::default(), &ImageConfig::default()),
            Ok("/".into())
        );
    }

    #[test]
    fn exec() {
        let mut spec = Spec::default();
        let mut process = Process::default();
        process.set_env(Some(words(&["A=1"]))).set_terminal(Some(true));
        spec.set_process(Some(process));
        let exec = exec_process(&spec, &words(&["ls"]), false).expect("ok");
        assert_eq!(
            (exec.terminal(), exec.args(), exec.env()),
            (Some(false), &Some(words(&["ls"])), &Some(words(&["A=1"])))
        );
        let exec = exec_process(&spec, &words(&["sh"]), true).expect("ok");
        assert_eq!(exec.env(), &Some(words(&["A=1", "TERM=xterm"])));
        assert_eq!(exec_process(&spec, &[], false).expect_err("empty").field, "cmd");
        assert_eq!(
            exec_process(&spec, &words(&["a", "b\0"]), false)
                .expect_err("nul")
                .field,
            "cmd[1]"
        );
    }
}
