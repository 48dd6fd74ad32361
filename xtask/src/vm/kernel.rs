//! A kernel to boot: its image, and its modules if it has any.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

/// A kernel on this machine's disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kernel {
    /// The bzImage.
    pub(super) image: PathBuf,
    /// Its modules, laid out as `/lib/modules/VERSION`.
    pub(super) modules: Option<PathBuf>,
}

impl Kernel {
    /// The kernel of an unpacked Debian package.
    ///
    /// # Errors
    /// When its parts are not where Debian puts them.
    pub(super) fn of_package(files: &Path) -> Result<Self> {
        let release = release_in(files)?;
        let image = files.join(format!("boot/vmlinuz-{release}"));
        let modules = files.join("lib/modules").join(release);
        Self::of_image(&image, Some(&modules)).with_context(|| {
            format!(
                "{} is not whole: remove it, to have it fetched again",
                files.display()
            )
        })
    }

    /// A kernel that the user named.
    ///
    /// # Errors
    /// When the image or `modules.dep` is not there.
    pub(super) fn of_image(image: &Path, modules: Option<&Path>) -> Result<Self> {
        ensure!(image.is_file(), "there is no kernel {}", image.display());
        let modules = modules.map(|dir| {
            let index = dir.join("modules.dep");
            ensure!(
                index.is_file(),
                "there is no {} (depmod makes it; the folder is one as /lib/modules/VERSION)",
                index.display()
            );
            // The guest sees it by this path.
            fs::canonicalize(dir).with_context(|| format!("resolve {}", dir.display()))
        });
        Ok(Self {
            image: image.to_owned(),
            modules: modules.transpose()?,
        })
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.image.display())
    }
}

/// The kernel release (`uname -r`) whose modules an unpacked package has.
///
/// # Errors
/// When it has not just one.
pub(super) fn release_in(files: &Path) -> Result<String> {
    let dir = files.join("lib/modules");
    let entries = fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))?;
    let names: Vec<_> = entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    match <[String; 1]>::try_from(names) {
        Ok([release]) => Ok(release),
        Err(names) => anyhow::bail!("{} has not one release but {names:?}", dir.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_package_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let files = dir.path();
        assert!(Kernel::of_package(files).is_err());
        let modules = files.join("lib/modules/6.1.0-1-x");
        fs::create_dir_all(&modules).unwrap();
        fs::create_dir(files.join("boot")).unwrap();
        fs::write(files.join("boot/vmlinuz-6.1.0-1-x"), "").unwrap();
        let error = format!("{:#}", Kernel::of_package(files).unwrap_err());
        assert!(error.contains("modules.dep"), "{error}");
        fs::write(modules.join("modules.dep"), "").unwrap();
        let kernel = Kernel::of_package(files).unwrap();
        assert_eq!(kernel.image, files.join("boot/vmlinuz-6.1.0-1-x"));
        assert_eq!(kernel.modules, Some(fs::canonicalize(modules).unwrap()));
    }

    #[test]
    fn an_image_that_is_not_there_is_named() {
        let error = Kernel::of_image(Path::new("/no/such/bzImage"), None).unwrap_err();
        assert!(error.to_string().contains("/no/such/bzImage"), "{error}");
    }
}
