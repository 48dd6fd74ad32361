//! A wire between two agents that can be cut.

use std::net::SocketAddr;

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};

/// Passes on what comes to its URL, as long as the test runs.
pub(crate) struct Wire {
    pub(crate) url: String,
    cuts: watch::Sender<()>,
}

impl Wire {
    /// A wire that leads to `address`.
    pub(crate) async fn to(address: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("tcp://{}", listener.local_addr().expect("bound"));
        let (cuts, cut) = watch::channel(());
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let mut cut = cut.clone();
                cut.mark_unchanged();
                tokio::spawn(async move {
                    let mut far = TcpStream::connect(address).await?;
                    near.set_nodelay(true)?;
                    far.set_nodelay(true)?;
                    tokio::select! {
                        passed = copy_bidirectional(&mut near, &mut far) => passed.map(drop),
                        _ = cut.changed() => Ok(()),
                    }
                });
            }
        });
        Self { url, cuts }
    }

    /// Breaks all connections through it; new ones are let through.
    pub(crate) fn cut(&self) {
        self.cuts.send_replace(());
    }
}
