//! OCI runtimes that hang, are slow or die where a test wants it.

use crate::harness::Options;

/// A shell script in the place of runc, with `$HERE` its directory.
pub(crate) struct FakeRuntime(tempfile::TempDir);

impl FakeRuntime {
    pub(crate) fn new(script: &str) -> Self {
        let fake = Self(tempfile::Builder::new().prefix("fake").tempdir().unwrap());
        // A link to the shell, as a program that was just written may be busy in another test's child.
        std::os::unix::fs::symlink("/bin/sh", fake.0.path().join("runc-fake")).unwrap();
        fake.write("script", &format!("HERE={}\n{script}\n", fake.0.path().display()));
        fake
    }

    pub(crate) fn options(&self) -> Options {
        Options {
            binary: self.0.path().join("runc-fake"),
            args: vec![self.0.path().join("script").display().to_string()],
            ..Options::default()
        }
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        std::fs::write(self.0.path().join(name), text).unwrap();
    }

    /// Empty where there is no such file.
    pub(crate) fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.0.path().join(name)).unwrap_or_default()
    }
}
