//! VXLAN (RFC 7348): the tunnel's parameters, and VXLAN's part of the seam.

use std::net::IpAddr;

use super::{
    Asked, Granted, MechanismError, TunnelEnd, TunnelKey,
    parameters::{
        DST_IP, DST_PORT, MTU, Parameters, SBFD_DISCRIMINATOR_DST, SBFD_DISCRIMINATOR_SRC,
        SBFD_VNI, SRC_IP, SRC_PORT, VNI, parse_address, parse_discriminator, parse_mtu, parse_port,
        parse_vni, set,
    },
};
use crate::{
    link::VXLAN_PORT,
    liveness::{Reflector, sbfd::Discriminator},
    net::Vni,
};

/// A VXLAN tunnel's parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    /// The client side's address.
    pub src_ip: Option<IpAddr>,
    /// The server side's address.
    pub dst_ip: Option<IpAddr>,
    /// The UDP port on which the client side receives; [`VXLAN_PORT`] when absent.
    pub src_port: u16,
    /// The UDP port on which the server side receives; [`VXLAN_PORT`] when absent.
    pub dst_port: u16,
    /// The identifier, once the server has chosen it.
    pub vni: Option<Vni>,
    /// The largest packet inside, in bytes.
    pub mtu: Option<u32>,
    /// The client side's S-BFD reflector, if it has one.
    pub src_discriminator: Option<Discriminator>,
    /// The server side's S-BFD reflector, if it has one.
    pub dst_discriminator: Option<Discriminator>,
    /// The sender's probe VNI; see [`SBFD_VNI`].
    pub sbfd_vni: Option<Vni>,
}

impl Default for Vxlan {
    fn default() -> Self {
        Self {
            src_ip: None,
            dst_ip: None,
            src_port: VXLAN_PORT,
            dst_port: VXLAN_PORT,
            vni: None,
            mtu: None,
            src_discriminator: None,
            dst_discriminator: None,
            sbfd_vni: None,
        }
    }
}

impl Vxlan {
    /// Reads the parameters.
    ///
    /// # Errors
    /// A value that cannot be used, with its key.
    pub fn parse(params: &Parameters) -> Result<Self, MechanismError> {
        Ok(Self {
            src_ip: parse_address(params, SRC_IP)?,
            dst_ip: parse_address(params, DST_IP)?,
            src_port: parse_port(params, SRC_PORT, VXLAN_PORT)?,
            dst_port: parse_port(params, DST_PORT, VXLAN_PORT)?,
            vni: parse_vni(params, VNI)?,
            mtu: parse_mtu(params)?,
            src_discriminator: parse_discriminator(params, SBFD_DISCRIMINATOR_SRC)?,
            dst_discriminator: parse_discriminator(params, SBFD_DISCRIMINATOR_DST)?,
            sbfd_vni: parse_vni(params, SBFD_VNI)?,
        })
    }

    /// Writes the parameters and leaves all others alone. What is absent is removed. A port is written with its
    /// address: a side without address has a port only where that is not the default.
    pub fn write(&self, params: &mut Parameters) {
        let port =
            |ip: Option<IpAddr>, port: u16| (ip.is_some() || port != VXLAN_PORT).then_some(port);
        set(params, SRC_IP, self.src_ip);
        set(params, DST_IP, self.dst_ip);
        set(params, SRC_PORT, port(self.src_ip, self.src_port));
        set(params, DST_PORT, port(self.dst_ip, self.dst_port));
        set(params, VNI, self.vni);
        set(params, MTU, self.mtu);
        let discriminator = |of: Option<Discriminator>| of.map(Discriminator::get);
        set(
            params,
            SBFD_DISCRIMINATOR_SRC,
            discriminator(self.src_discriminator),
        );
        set(
            params,
            SBFD_DISCRIMINATOR_DST,
            discriminator(self.dst_discriminator),
        );
        set(params, SBFD_VNI, self.sbfd_vni);
    }
}

/// The client's end offers itself, and nothing of the server's.
pub(super) fn offer(own: &TunnelEnd, mtu: u32) -> Parameters {
    let mut params = Parameters::new();
    Vxlan {
        src_ip: Some(own.address),
        src_port: own.port,
        // A port that is not the default is the same at both ends.
        dst_port: own.port,
        mtu: Some(mtu),
        src_discriminator: own.reflector.map(|it| it.discriminator),
        sbfd_vni: own.reflector.map(|it| it.vni),
        ..Vxlan::default()
    }
    .write(&mut params);
    params
}

/// A tunnel that stands is asked for again: what the server wrote in the client's place becomes the client's again.
pub(super) fn renew(standing: &mut Parameters, offer: &Parameters) {
    for key in [MTU, SBFD_DISCRIMINATOR_SRC, SBFD_VNI] {
        standing.remove(key);
        if let Some(value) = offer.get(key) {
            standing.insert(key.to_owned(), value.clone());
        }
    }
}

/// Another server is asked than the one that granted these.
pub(super) fn forget_grant(standing: &mut Parameters) {
    standing.remove(VNI);
}

/// What the client's end asks the server's end for.
pub(super) fn asked(params: &Parameters) -> Result<Asked, MechanismError> {
    let vxlan = Vxlan::parse(params)?;
    Ok(Asked {
        client: TunnelEnd {
            address: vxlan.src_ip.ok_or(MechanismError::NoClientAddress)?,
            port: vxlan.src_port,
            reflector: reflector(vxlan.src_discriminator, vxlan.sbfd_vni),
        },
        mtu: vxlan.mtu,
        standing: vxlan.vni.map(|vni| (TunnelKey::Vni(vni), vxlan.dst_ip)),
    })
}

/// The server's end answers with itself and the VNI that it chose; what the client wrote stays.
pub(super) fn answer(
    params: &mut Parameters,
    own: &TunnelEnd,
    key: TunnelKey,
    mtu: u32,
) -> Result<(), MechanismError> {
    let TunnelKey::Vni(vni) = key;
    Vxlan {
        dst_ip: Some(own.address),
        dst_port: own.port,
        vni: Some(vni),
        mtu: Some(mtu),
        dst_discriminator: own.reflector.map(|it| it.discriminator),
        sbfd_vni: own.reflector.map(|it| it.vni),
        ..Vxlan::parse(params)?
    }
    .write(params);
    Ok(())
}

/// What the server's end has granted.
pub(super) fn granted(params: &Parameters) -> Result<Granted, MechanismError> {
    let vxlan = Vxlan::parse(params)?;
    let (Some(vni), Some(address)) = (vxlan.vni, vxlan.dst_ip) else {
        return Err(MechanismError::NotGranted);
    };
    Ok(Granted {
        server: TunnelEnd {
            address,
            port: vxlan.dst_port,
            reflector: reflector(vxlan.dst_discriminator, vxlan.sbfd_vni),
        },
        mtu: vxlan.mtu,
        watches_path: vxlan.dst_discriminator.is_some(),
        key: TunnelKey::Vni(vni),
    })
}

/// A reflector, where both of its parameters are there.
fn reflector(discriminator: Option<Discriminator>, vni: Option<Vni>) -> Option<Reflector> {
    Some(Reflector {
        discriminator: discriminator?,
        vni: vni?,
    })
}
