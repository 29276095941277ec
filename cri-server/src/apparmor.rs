//! The AppArmor profile that RuntimeDefault means: shipped with the daemon, and loaded at its start where AppArmor is
//! enabled and no profile of the name is loaded, so that an operator's own comes first.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use catamaran_spec::APPARMOR_DEFAULT_PROFILE;
use tokio::process::Command;

/// As `deploy/apparmor/catamaran-default`.
const PROFILE: &str = include_str!("../../deploy/apparmor/catamaran-default");
const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
const LOADED: &str = "/sys/kernel/security/apparmor/profiles";
/// The parser compiles a profile in well under a second.
const LOAD_LIMIT: Duration = Duration::from_secs(20);

/// How it is with the default profile on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Profile {
    /// The kernel has no AppArmor, or it is switched off.
    NotNeeded,
    /// A profile of the name is loaded.
    Loaded,
    /// It can be loaded by this parser.
    Loadable(PathBuf),
    /// Why it cannot be loaded, and what to do.
    Missing(String),
}

/// Looks at this node.
pub(crate) fn look() -> Profile {
    let read = |path| std::fs::read_to_string(path).ok();
    // A service manager's PATH may lack the administrator's directories.
    let parser = crate::shim::find_in_path("apparmor_parser").or_else(|| {
        let places = ["/usr/sbin/apparmor_parser", "/sbin/apparmor_parser"];
        places.iter().map(PathBuf::from).find(|path| path.is_file())
    });
    decide(read(ENABLED).as_deref(), read(LOADED).as_deref(), parser)
}

fn decide(enabled: Option<&str>, loaded: Option<&str>, parser: Option<PathBuf>) -> Profile {
    if enabled.map(str::trim) != Some("Y") {
        return Profile::NotNeeded;
    }
    let Some(loaded) = loaded else {
        return Profile::Missing(format!(
            "{LOADED} cannot be read; mount securityfs (`mount -t securityfs none /sys/kernel/security`)"
        ));
    };
    // Lines are "name (mode)".
    let mut names = loaded
        .lines()
        .filter_map(|line| line.rsplit_once(" ("))
        .map(|(name, _)| name);
    match parser {
        _ if names.any(|name| name == APPARMOR_DEFAULT_PROFILE) => Profile::Loaded,
        Some(parser) => Profile::Loadable(parser),
        None => Profile::Missing(
            "apparmor_parser is not installed; install it (Debian: apparmor) and start the server again"
                .to_owned(),
        ),
    }
}

/// Loads the profile where it is needed and not there; `state` is the daemon's directory. Without it containers that
/// ask for RuntimeDefault are refused by name, so a failure is a warning here.
pub(crate) async fn load(state: &Path) {
    let loaded = match look() {
        Profile::NotNeeded | Profile::Loaded => return,
        Profile::Loadable(parser) => load_by(&parser, state).await,
        Profile::Missing(problem) => Err(problem),
    };
    match loaded {
        Ok(()) => tracing::info!(profile = APPARMOR_DEFAULT_PROFILE, "AppArmor profile loaded"),
        Err(problem) => tracing::warn!(
            profile = APPARMOR_DEFAULT_PROFILE,
            problem,
            "AppArmor's default profile is not loaded: containers that ask for RuntimeDefault will be refused"
        ),
    }
}

async fn load_by(parser: &Path, state: &Path) -> Result<(), String> {
    let file = state.join(APPARMOR_DEFAULT_PROFILE);
    std::fs::write(&file, PROFILE).map_err(|e| format!("cannot write {}: {e}", file.display()))?;
    let run = Command::new(parser)
        .args(["--add", "--skip-cache", "--quiet"])
        .arg(&file)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(LOAD_LIMIT, run)
        .await
        .map_err(|_| {
            format!(
                "{} did not end within {} s",
                parser.display(),
                LOAD_LIMIT.as_secs()
            )
        })?
        .map_err(|e| format!("{}: {e}", parser.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!(
        "{} ended with {}: {}",
        parser.display(),
        output.status,
        said.trim()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_profile_is_loaded_where_it_is_needed_and_nobodys_own_is_there() {
        let parser = || Some(PathBuf::from("/sbin/apparmor_parser"));
        let other =
            "unconfined (unconfined)\ncatamaran-default//child (enforce)\n/usr/bin/a (x) b (enforce)\n";
        let own = "docker-default (enforce)\ncatamaran-default (complain)\n";
        for (enabled, loaded, parser, expected) in [
            (None, None, parser(), Profile::NotNeeded),
            (Some("N\n"), Some(""), parser(), Profile::NotNeeded),
            (Some("Y\n"), Some(own), None, Profile::Loaded),
            (
                Some("Y\n"),
                Some(other),
                parser(),
                Profile::Loadable("/sbin/apparmor_parser".into()),
            ),
        ] {
            assert_eq!(
                decide(enabled, loaded, parser),
                expected,
                "{enabled:?} {loaded:?}"
            );
        }
        for (loaded, parser, remedy) in [
            (Some(other), None, "install it"),
            (None, parser(), "mount securityfs"),
        ] {
            match decide(Some("Y"), loaded, parser) {
                Profile::Missing(problem) => assert!(problem.contains(remedy), "{problem}"),
                found => panic!("{found:?}"),
            }
        }
    }

    #[test]
    fn the_shipped_profile_has_the_name_that_containers_are_given() {
        assert!(PROFILE.contains(&format!("\nprofile {APPARMOR_DEFAULT_PROFILE} ")));
    }

    #[tokio::test]
    async fn a_parser_is_given_the_profile_and_what_it_says_is_told() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let parser = dir.path().join("parser");
        let script = |text: &str| {
            let new = dir.path().join("new");
            std::fs::write(&new, format!("#!/bin/sh\n{text}\n")).unwrap();
            std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).unwrap();
            std::fs::rename(&new, &parser).unwrap();
        };
        script("for file; do :; done; grep -q '^profile catamaran-default' \"$file\"");
        load_by(&parser, dir.path()).await.unwrap();
        script("echo no such rule >&2; exit 1");
        let problem = load_by(&parser, dir.path()).await.unwrap_err();
        assert!(problem.ends_with("no such rule"), "{problem}");
    }
}
