//! A kernel to boot: its image, and its modules if it has any.

use std::{
    fmt,
    fs::{self, File},
    io::Read as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

const FETCH_AGAIN: &str = "remove it, to have it fetched again";

/// A kernel on this machine's disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kernel {
    /// The bzImage.
    pub(super) image: PathBuf,
    /// Its modules, laid out as `/lib/modules/VERSION`.
    pub(super) modules: Option<PathBuf>,
    /// The unpacked package that it is of.
    package: Option<PathBuf>,
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
        let kernel = Self::of_image(&image, Some(&modules))
            .with_context(|| format!("{} is not whole: {}", files.display(), FETCH_AGAIN))?;
        Ok(Self {
            package: Some(files.to_owned()),
            ..kernel
        })
    }

    /// What can be done about a kernel whose files cannot be used.
    pub(super) fn remedy(&self) -> String {
        self.package.as_ref().map_or_else(String::new, |package| {
            format!("; if {} is not whole, {FETCH_AGAIN}", package.display())
        })
    }

    /// A kernel that the user named.
    ///
    /// # Errors
    /// When the image or `modules.dep` is not there, or the image is not a whole bzImage.
    pub(super) fn of_image(image: &Path, modules: Option<&Path>) -> Result<Self> {
        ensure!(image.is_file(), "there is no kernel {}", image.display());
        check_image(image).with_context(|| format!("{} is no kernel to boot", image.display()))?;
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
            package: None,
        })
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.image.display())
    }
}

/// Reads of a bzImage's header how long the file must be (the kernel's Documentation/arch/x86/boot.rst): `setup_sects` sectors of 512
/// bytes, one for the boot sector, and `syssize` units of 16 bytes.
fn check_image(image: &Path) -> Result<()> {
    let mut header = [0; 0x206];
    let mut file = File::open(image)?;
    file.read_exact(&mut header)
        .context("it is shorter than the header of a bzImage")?;
    ensure!(&header[0x202..] == b"HdrS", "it is no bzImage");
    let sectors = match header[0x1f1] {
        0 => 4,
        some => u64::from(some),
    };
    let [a, b, c, d] = [0, 1, 2, 3].map(|byte| header[0x1f4 + byte]);
    let whole = (sectors + 1) * 512 + u64::from(u32::from_le_bytes([a, b, c, d])) * 16;
    let length = file.metadata()?.len();
    ensure!(
        length >= whole,
        "it has {length} bytes, and its header asks for {whole}"
    );
    Ok(())
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

    /// The header of a bzImage, and as many bytes as it asks for.
    fn image() -> Vec<u8> {
        let mut image = vec![0; 2 * 512 + 16];
        image[0x1f1] = 1;
        image[0x1f4] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image
    }

    #[test]
    fn what_is_no_whole_image_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let refusal = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            let refused = Kernel::of_image(&path, None).map(drop);
            refused.map_err(|error| format!("{error:#}"))
        };
        let whole = image();
        assert_eq!(refusal(&whole), Ok(()));
        for (bytes, word) in [
            (&whole[..whole.len() - 1], "asks for 1040"),
            (&[], "shorter"),
            (&[7; 4096], "no bzImage"),
        ] {
            let refused = refusal(bytes).unwrap_err();
            assert!(refused.contains(word), "no {word}: {refused}");
        }
    }

    #[test]
    fn the_parts_of_a_package_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let files = dir.path();
        assert!(Kernel::of_package(files).is_err());
        let modules = files.join("lib/modules/6.1.0-1-x");
        fs::create_dir_all(&modules).unwrap();
        fs::create_dir(files.join("boot")).unwrap();
        fs::write(files.join("boot/vmlinuz-6.1.0-1-x"), image()).unwrap();
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
