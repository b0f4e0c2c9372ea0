package probes

import (
	"fmt"
	"slices"

	"github.com/hosthygiene/agent/pkg/host"
)

// HowToBring tells the owner of a system on which nothing is installed how what
// is missing comes there; "" where packages are installed. The way is the
// distribution's: an image that takes extensions, one that takes none, a tree
// that others compose.
func HowToBring(o host.OS, what string) string {
	switch o.Class {
	case host.OSTree:
		switch {
		case slices.Contains([]string{"rhcos", "scos"}, o.ID), o.VariantID == "coreos" && slices.Contains([]string{"rhel", "centos"}, o.ID):
			return fmt.Sprintf("bring %s as an extension of a MachineConfig or with a layered image", what)
		case o.ID == "fedora" && o.VariantID == "coreos":
			return fmt.Sprintf("layer %s with 'rpm-ostree install', from a unit of its Butane configuration so that new nodes have it too", what)
		}
		return fmt.Sprintf("layer %s with 'rpm-ostree install' and reboot, or bring it with the image", what)
	case host.Image:
		switch o.ID {
		case "talos":
			return fmt.Sprintf("add the system extension that brings %s to the node's image", what)
		case "flatcar":
			return fmt.Sprintf("bring %s as a systemd-sysext image that Ignition puts there", what)
		case "bottlerocket":
			return fmt.Sprintf("choose a variant that has %s or build one, for Bottlerocket takes neither packages nor extensions", what)
		case "cos":
			return fmt.Sprintf("choose a node image that has %s, such as one with Ubuntu, for this one takes neither packages nor extensions", what)
		}
		return fmt.Sprintf("bring %s with another image or a system extension", what)
	}
	return ""
}

// KeptElsewhere says where modules and sysctls are set for every boot on a system
// whose /etc does not outlive one; "" where it does.
func KeptElsewhere(o host.OS) string {
	switch o.ID {
	case "bottlerocket":
		return "settings.kernel.modules and settings.kernel.sysctl of Bottlerocket's API"
	case "talos":
		return "machine.kernel.modules and machine.sysctls of Talos' machine configuration"
	}
	return ""
}
