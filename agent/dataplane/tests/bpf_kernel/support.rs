//! What the BPF tests share: a sandbox, and frames.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use aya::programs::{ProgramInfo, SchedClassifier, TcAttachType};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use nsm_core::net::Vni;
use nsm_dataplane::bpf::{Bpf, BpfConfig, BpfError, Direction, Hook};

pub(crate) use super::programs::{Gso, NEXT, Programs};

/// TC_ACT_SHOT.
pub(crate) const DROP: i32 = 2;

/// Runs a test in a thread with network and mount namespaces of its own and a BPF filesystem on `/sys/fs/bpf`. All of them
/// are gone with the thread and its child processes, and with them every interface and pin, however the test ends.
pub(crate) fn sandbox(test: impl FnOnce() + Send + 'static) {
    let ran = thread::Builder::new()
        .name("sandbox".to_owned())
        .spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("unshare");
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private");
            mount(
                Some("bpf"),
                "/sys/fs/bpf",
                Some("bpf"),
                MsFlags::empty(),
                none,
            )
            .expect("bpffs");
            ip("link set lo up");
            test();
        })
        .expect("spawn")
        .join();
    if let Err(panic) = ran {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a test once for each hook that this kernel has, each in a sandbox of its own.
pub(crate) fn for_each_hook(test: impl Fn(Hook) + Send + Copy + 'static) {
    for hook in hooks() {
        sandbox(move || test(hook));
    }
}

/// The hooks that this kernel has: tcx came with 6.6.
pub(crate) fn hooks() -> Vec<Hook> {
    let mut hooks = vec![Hook::Clsact];
    hooks.extend(has_tcx().then_some(Hook::Tcx));
    hooks
}

pub(crate) fn has_tcx() -> bool {
    SchedClassifier::query_tcx("lo", TcAttachType::Ingress).is_ok()
}

/// An Ethernet interface that is up.
pub(crate) fn link(name: &str) {
    ip(&format!("link add {name} type veth peer name p-{name}"));
    ip(&format!("link set {name} up"));
    ip(&format!("link set p-{name} up"));
}

/// Identifiers of the programs on the way in and on the way out of an interface.
pub(crate) fn hanging(hook: Hook, interface: &str) -> [Vec<u32>; 2] {
    match hook {
        Hook::Tcx => [TcAttachType::Ingress, TcAttachType::Egress].map(|way| {
            let (_, programs) = SchedClassifier::query_tcx(interface, way).expect("query");
            programs.iter().map(ProgramInfo::id).collect()
        }),
        Hook::Clsact => ["ingress", "egress"].map(|way| {
            let filters = run("tc", &format!("filter show dev {interface} {way}"));
            let lines = filters
                .lines()
                .filter(|line| line.contains(" direct-action"));
            let id = |line: &str| line.split(" id ").nth(1)?.split(' ').next()?.parse().ok();
            lines.map(|line| id(line).expect("an id")).collect()
        }),
    }
}

/// `ip` with these words.
pub(crate) fn ip(words: &str) {
    run("ip", words);
}

/// Runs a program in the namespaces of the calling thread, and gives back what it wrote.
pub(crate) fn run(program: &str, words: &str) -> String {
    let output = Command::new(program)
        .args(words.split_whitespace())
        .output()
        .unwrap_or_else(|error| panic!("cannot start {program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {words}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("text")
}

pub(crate) const PIN_DIR: &str = "/sys/fs/bpf/proxy-nsmgr";

/// A configuration for these interfaces.
pub(crate) fn config(interfaces: &[&str]) -> BpfConfig {
    BpfConfig {
        pin_dir: PathBuf::from(PIN_DIR),
        interfaces: interfaces.iter().map(|name| (*name).to_owned()).collect(),
        mount_bpffs: false,
        ..BpfConfig::default()
    }
}

/// Likewise, with the programs on this hook.
pub(crate) fn config_by(hook: Hook, interfaces: &[&str]) -> BpfConfig {
    BpfConfig {
        hook: Some(hook),
        ..config(interfaces)
    }
}

/// Names in a directory, sorted.
pub(crate) fn names(dir: impl AsRef<Path>) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .expect("a directory")
        .map(|entry| {
            entry
                .expect("entry")
                .file_name()
                .into_string()
                .expect("UTF-8")
        })
        .collect();
    names.sort();
    names
}

/// No map, link or program is pinned.
pub(crate) fn assert_nothing_left() {
    let left: Vec<String> = names("/sys/fs/bpf")
        .into_iter()
        .filter(|name| !name.ends_with(".debug"))
        .collect();
    assert_eq!(left, [""; 0]);
}

pub(crate) fn vni(number: u32) -> Vni {
    Vni::try_from(number).expect("a VNI")
}

pub(crate) fn addr(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// The programs over the maps in [`PIN_DIR`].
pub(crate) fn programs() -> Programs {
    Programs::over(Path::new(PIN_DIR))
}

/// Runs a frame through a program of the underlay once.
pub(crate) fn verdict(programs: &Programs, direction: Direction, frame: &[u8]) -> i32 {
    let name = format!("underlay_{direction}");
    let (run, _) = programs.run(&name, frame, Gso::default(), 1);
    run.return_value.cast_signed()
}

/// Every drop counter that is not zero.
pub(crate) fn drops(bpf: &Bpf) -> Vec<(&'static str, u64)> {
    bpf.drops()
        .expect("drops")
        .into_iter()
        .filter(|(_, count)| *count != 0)
        .collect()
}

/// Loads without interfaces: for tests that hand frames to the programs themselves.
pub(crate) fn load_detached() -> Result<Bpf, BpfError> {
    Bpf::load(&config(&[]))
}

/// A frame, built header by header; its lengths are filled in at the end.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub(crate) vlan_tags: Vec<u16>,
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    /// IPv4 options, a multiple of 4 bytes.
    pub(crate) options: Vec<u8>,
    /// IPv4 flags and fragment offset.
    pub(crate) fragment: u16,
    /// IPv6 extension headers: number, and everything after the next-header byte.
    pub(crate) extensions: Vec<(u8, Vec<u8>)>,
    pub(crate) protocol: u8,
    pub(crate) port: u16,
    pub(crate) udp_length: Option<u16>,
    pub(crate) vxlan_flags: u8,
    pub(crate) vni: u32,
    pub(crate) inner: Vec<u8>,
}

impl Frame {
    /// A VXLAN packet with 64 bytes inside.
    pub(crate) fn new(source: &str, destination: &str, vni: u32) -> Self {
        Self {
            vlan_tags: Vec::new(),
            source: addr(source),
            destination: addr(destination),
            options: Vec::new(),
            fragment: 0,
            extensions: Vec::new(),
            protocol: 17,
            port: 4789,
            udp_length: None,
            vxlan_flags: 0x08,
            vni,
            inner: vec![0; 64],
        }
    }

    pub(crate) fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut payload = vec![self.vxlan_flags, 0, 0, 0];
        payload.extend(&(self.vni << 8).to_be_bytes());
        payload.extend(&self.inner);
        let udp_length = self.udp_length.unwrap_or(payload.len() as u16 + 8);
        let mut udp = 12345_u16.to_be_bytes().to_vec();
        udp.extend(self.port.to_be_bytes());
        udp.extend(udp_length.to_be_bytes());
        udp.extend([0, 0]);
        udp.extend(payload);

        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        for tag in &self.vlan_tags {
            frame.extend(tag.to_be_bytes());
            frame.extend([0, 7]);
        }
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                frame.extend([0x08, 0x00]);
                frame.extend(self.ipv4(source, destination, udp.len()));
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                frame.extend([0x86, 0xdd]);
                frame.extend(self.ipv6(source, destination, udp.len()));
            }
            _ => panic!("addresses of one family"),
        }
        frame.extend(udp);
        frame
    }

    fn ipv4(&self, source: Ipv4Addr, destination: Ipv4Addr, payload: usize) -> Vec<u8> {
        let words = 5 + self.options.len() / 4;
        let total = (words * 4 + payload) as u16;
        let mut header = vec![0x40 | words as u8, 0];
        header.extend(total.to_be_bytes());
        header.extend([0, 1]);
        header.extend(self.fragment.to_be_bytes());
        header.extend([64, self.protocol, 0, 0]);
        header.extend(source.octets());
        header.extend(destination.octets());
        header.extend(&self.options);
        header
    }

    fn ipv6(&self, source: Ipv6Addr, destination: Ipv6Addr, payload: usize) -> Vec<u8> {
        let mut chain = Vec::new();
        let numbers: Vec<u8> = self
            .extensions
            .iter()
            .map(|(number, _)| *number)
            .chain([self.protocol])
            .collect();
        for ((_, body), next) in self.extensions.iter().zip(&numbers[1..]) {
            chain.push(*next);
            chain.extend(body);
        }
        let mut header = vec![0x60, 0, 0, 0];
        header.extend(((chain.len() + payload) as u16).to_be_bytes());
        header.extend([numbers[0], 64]);
        header.extend(source.octets());
        header.extend(destination.octets());
        header.extend(chain);
        header
    }
}

/// Takes every capability from the calling thread but these (capabilities(7) has their numbers).
pub(crate) fn drop_capabilities_but(keep: &[u32]) {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    // _LINUX_CAPABILITY_VERSION_3: two words of 32 capabilities each.
    let header = Header {
        version: 0x2008_0522,
        pid: 0,
    };
    let mut data = [Data {
        effective: 0,
        permitted: 0,
        inheritable: 0,
    }; 2];
    for capability in keep {
        let word = &mut data[*capability as usize / 32];
        word.effective |= 1 << (capability % 32);
        word.permitted = word.effective;
    }
    // SAFETY: both structures are as capset(2) wants them for this version, and outlive the call.
    let result =
        unsafe { nix::libc::syscall(nix::libc::SYS_capset, &raw const header, data.as_ptr()) };
    assert_eq!(result, 0, "capset: {}", std::io::Error::last_os_error());
}
