//! Paths of systemd's slices and scopes (systemd.slice(5)), for nodes whose kubelet has the systemd driver.

use crate::error::{CgroupError, Result};

/// The cgroup path of a slice: each dash is one level, `a-b.slice` is `/a.slice/a-b.slice`. `-.slice` is the
/// root and gives an empty path.
///
/// # Errors
/// [`CgroupError::InvalidSlice`].
pub fn slice_path(slice: &str) -> Result<String> {
    let invalid = || CgroupError::InvalidSlice(slice.chars().take(200).collect());
    let name = slice.strip_suffix(".slice").ok_or_else(invalid)?;
    if name == "-" {
        return Ok(String::new());
    }
    if name.is_empty() || name.contains('/') || name.split('-').any(str::is_empty) {
        return Err(invalid());
    }
    let ends = name
        .match_indices('-')
        .map(|(index, _)| index)
        .chain([name.len()]);
    Ok(ends.map(|end| format!("/{}.slice", &name[..end])).collect())
}

/// The cgroup path of the scope that an OCI runtime makes for `cgroupsPath` `<slice>:<prefix>:<id>`.
///
/// # Errors
/// [`CgroupError::InvalidSlice`].
pub fn scope_path(slice: &str, prefix: &str, id: &str) -> Result<String> {
    Ok(format!("{}/{prefix}-{id}.scope", slice_path(slice)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dashes_are_levels() {
        assert_eq!(
            slice_path("kubepods-burstable-pod1_2.slice").unwrap(),
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice"
        );
        assert_eq!(slice_path("system.slice").unwrap(), "/system.slice");
        assert_eq!(slice_path("-.slice").unwrap(), "");
        assert_eq!(scope_path("a.slice", "cri", "x").unwrap(), "/a.slice/cri-x.scope");
        for bad in [
            "",
            "a",
            ".slice",
            "a--b.slice",
            "-a.slice",
            "a-.slice",
            "/a.slice",
        ] {
            assert!(slice_path(bad).is_err(), "{bad:?}");
        }
    }
}
