//! Which cloud the machine is in, by its firmware.
//!
//! A metadata service is plain HTTP on an address that belongs to the cloud there, and may belong to any host elsewhere: its answer
//! could move the node. So the service is asked without configuration only where the firmware names the cloud, which no neighbour on
//! the network can forge.
//! What is compared are the fields of SMBIOS (DMTF DSP0134, types 1 to 3), which Linux shows in `/sys/class/dmi/id`.

use super::Provider;

/// Azure's asset tag: Hyper-V has the same vendor everywhere.
const AZURE_ASSET_TAG: &str = "7783-7084-3265-9085-8269-3286-77";

/// The identity of the machine by its firmware; a missing field is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Firmware {
    /// The system's manufacturer (`sys_vendor`).
    pub system_vendor: String,
    /// The system's product name (`product_name`).
    pub product: String,
    /// The board's manufacturer (`board_vendor`).
    pub board_vendor: String,
    /// The chassis' asset tag (`chassis_asset_tag`).
    pub asset_tag: String,
    /// The version of the BIOS (`bios_version`).
    pub bios_version: String,
    /// The system's identity (`product_uuid`), which root can read.
    pub product_uuid: String,
    /// The system's serial number (`product_serial`), which root can read.
    pub product_serial: String,
}

impl Firmware {
    /// The cloud that the firmware names.
    #[must_use]
    pub fn cloud(&self) -> Option<Provider> {
        let is_made_by = |makers: &[&str]| {
            [&self.system_vendor, &self.board_vendor]
                .iter()
                .any(|vendor| makers.contains(&vendor.trim()))
        };
        if is_made_by(&["Amazon EC2"]) || self.is_ec2_on_xen() {
            Some(Provider::Aws)
        } else if is_made_by(&["Google"]) && self.product.trim() == "Google Compute Engine" {
            // Google sells laptops, too.
            Some(Provider::Gcp)
        } else if is_made_by(&["Microsoft Corporation"]) && self.asset_tag.trim() == AZURE_ASSET_TAG
        {
            Some(Provider::Azure)
        } else if is_made_by(&["Packet", "Equinix", "Equinix Metal"]) {
            Some(Provider::Equinix)
        } else {
            None
        }
    }

    /// Instances of EC2 of the types before Nitro have Xen as their vendor, as anybody's guests of Xen have.
    fn is_ec2_on_xen(&self) -> bool {
        let is_ec2 = |identity: &str| {
            let start = identity.trim().get(..3);
            start.is_some_and(|start| start.eq_ignore_ascii_case("ec2"))
        };
        self.system_vendor.trim() == "Xen"
            && self.bios_version.trim().ends_with(".amazon")
            && is_ec2(&self.product_uuid)
            && is_ec2(&self.product_serial)
    }
}
