//! The holder of a UDP port, read from /proc, for the error message.

use std::{
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use super::PortHolder;

/// The holder of a UDP port in the namespace of the calling thread.
pub(super) fn holder(port: u16) -> PortHolder {
    let inode = ["/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"]
        .into_iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .find_map(|table| socket_inode(&table, port));
    match inode {
        None => PortHolder::Unknown,
        Some(0) => PortHolder::Socket { inode: 0 },
        Some(inode) => process_with(inode).unwrap_or(PortHolder::Socket { inode }),
    }
}

/// The inode of the socket that is bound to the port, from the text of /proc/net/udp (proc_net(5)): columns 2 and 10.
fn socket_inode(table: &str, port: u16) -> Option<u64> {
    table.lines().skip(1).find_map(|line| {
        let mut columns = line.split_ascii_whitespace();
        let (_, local_port) = columns.nth(1)?.rsplit_once(':')?;
        if u16::from_str_radix(local_port, 16).ok()? != port {
            return None;
        }
        columns.nth(7)?.parse().ok()
    })
}

fn process_with(inode: u64) -> Option<PortHolder> {
    let socket = format!("socket:[{inode}]");
    let is_it = |path: PathBuf| {
        fs::read_link(path).is_ok_and(|target| target.as_os_str().as_bytes() == socket.as_bytes())
    };
    entries(Path::new("/proc")).find_map(|process| {
        let pid = process.file_name()?.to_str()?.parse().ok()?;
        entries(&process.join("fd")).any(is_it).then(|| {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            PortHolder::Process {
                pid,
                name: name.trim_end().to_owned(),
            }
        })
    })
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn reads_the_table() {
        let table = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n \
                     1143: 00000000:12B5 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 0 2 0000000000000000 0\n \
                     2041: 0100007F:14E9 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 31337 2 0000000000000000 0\n";
        assert_eq!(socket_inode(table, 4789), Some(0));
        assert_eq!(socket_inode(table, 5353), Some(31337));
        assert_eq!(socket_inode(table, 53), None);
        assert_eq!(socket_inode("", 53), None);
        assert_eq!(socket_inode("head\n1: x\n\n2: 00:zz", 53), None);
    }

    #[test]
    fn finds_this_process() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            // A machine may have no IPv6.
            let Ok(socket) = UdpSocket::bind(address) else {
                continue;
            };
            let port = socket.local_addr().unwrap().port();
            assert!(
                matches!(holder(port), PortHolder::Process { pid, .. } if pid == std::process::id()),
                "{:?}",
                holder(port)
            );
        }
    }
}
