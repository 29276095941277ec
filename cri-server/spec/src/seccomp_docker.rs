//! Seccomp profiles in Docker's format: rules with conditions (capabilities, architectures, the kernel's version) and
//! a map of architectures, which the OCI format has not. CRI-O decides the conditions as here; containerd drops them,
//! which lets a rule for CAP_SYS_ADMIN apply to everyone.

use oci_spec::runtime::{Capabilities, Capability};
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// This architecture as the profiles spell it, and as Go does, which the conditions use.
const ARCHITECTURE: (&str, &str) = if cfg!(target_arch = "x86_64") {
    ("SCMP_ARCH_X86_64", "amd64")
} else {
    ("SCMP_ARCH_AARCH64", "arm64")
};

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Conditions {
    arches: Option<Vec<String>>,
    caps: Option<Vec<String>>,
    min_kernel: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArchitectureEntry {
    architecture: String,
    #[serde(default)]
    sub_architectures: Option<Vec<String>>,
}

/// Makes an OCI profile of one in Docker's format; an OCI profile stays as it is.
pub(crate) fn resolve(
    profile: &mut Value,
    bounding: &Capabilities,
    kernel: (u32, u32),
) -> Result<(), String> {
    let Some(profile) = profile.as_object_mut() else {
        return Ok(());
    };
    if let Some(map) = profile.remove("archMap") {
        architectures(profile, map)?;
    }
    let Some(Value::Array(rules)) = profile.get_mut("syscalls") else {
        return Ok(());
    };
    let mut kept = Vec::with_capacity(rules.len());
    for mut rule in std::mem::take(rules) {
        if let Some(rule) = rule.as_object_mut()
            && !applies(rule, bounding, kernel)?
        {
            continue;
        }
        kept.push(rule);
    }
    *rules = kept;
    Ok(())
}

fn architectures(profile: &mut Map<String, Value>, map: Value) -> Result<(), String> {
    let entries: Option<Vec<ArchitectureEntry>> =
        serde_json::from_value(map).map_err(|error| format!("archMap: {error}"))?;
    let entries = entries.unwrap_or_default();
    let listed = profile.get("architectures").and_then(Value::as_array);
    if !entries.is_empty() && listed.is_some_and(|listed| !listed.is_empty()) {
        return Err("it has both architectures and archMap".into());
    }
    if let Some(own) = entries
        .into_iter()
        .find(|entry| entry.architecture == ARCHITECTURE.0)
    {
        let mut all = vec![own.architecture];
        all.extend(own.sub_architectures.unwrap_or_default());
        profile.insert("architectures".into(), json!(all));
    }
    Ok(())
}

/// Decides the conditions of a rule and takes them away, and spells a single name as a list.
fn applies(
    rule: &mut Map<String, Value>,
    bounding: &Capabilities,
    kernel: (u32, u32),
) -> Result<bool, String> {
    let mut conditions = |key: &str| -> Result<Conditions, String> {
        let value = rule.remove(key).unwrap_or(Value::Null);
        let conditions: Option<Conditions> =
            serde_json::from_value(value).map_err(|error| format!("{key} of a rule: {error}"))?;
        Ok(conditions.unwrap_or_default())
    };
    let (includes, excludes) = (conditions("includes")?, conditions("excludes")?);
    if let Some(Value::String(name)) = rule.remove("name")
        && !name.is_empty()
    {
        if rule
            .get("names")
            .and_then(Value::as_array)
            .is_some_and(|names| !names.is_empty())
        {
            return Err("a rule has both name and names".into());
        }
        rule.insert("names".into(), json!([name]));
    }
    let here = |arches: &[String]| arches.iter().any(|arch| arch == ARCHITECTURE.1);
    let has = |name: &String| {
        let bare = name.strip_prefix("CAP_").unwrap_or(name);
        bare.parse::<Capability>()
            .is_ok_and(|capability| bounding.contains(&capability))
    };
    let arches = |of: &Conditions| of.arches.clone().unwrap_or_default();
    let caps = |of: &Conditions| of.caps.clone().unwrap_or_default();
    let (wanted, unwanted) = (arches(&includes), arches(&excludes));
    let included = (wanted.is_empty() || here(&wanted))
        && caps(&includes).iter().all(has)
        && at_least(&includes.min_kernel, kernel)?.unwrap_or(true);
    let excluded = here(&unwanted)
        || caps(&excludes).iter().any(has)
        || at_least(&excludes.min_kernel, kernel)?.unwrap_or(false);
    Ok(included && !excluded)
}

/// Whether the kernel is of this version or newer; `None` without a version.
fn at_least(version: &str, kernel: (u32, u32)) -> Result<Option<bool>, String> {
    if version.is_empty() {
        return Ok(None);
    }
    let wanted = kernel_version(version).ok_or_else(|| format!("minKernel {version:?} is no version"))?;
    Ok(Some(kernel >= wanted))
}

/// Major and minor version of a kernel's release.
pub(crate) fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release
        .trim()
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}
