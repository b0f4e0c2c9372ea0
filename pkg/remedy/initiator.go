package remedy

import (
	"crypto/rand"
	"encoding/hex"
)

// initiatorPrefix is the naming authority each distribution's iscsi-iname uses,
// so that an array's administrator sees what he is used to.
func initiatorPrefix(osID string) string {
	switch osID {
	case "debian", "ubuntu":
		return "iqn.1993-08.org.debian:01:"
	case "sles", "opensuse-leap", "opensuse-tumbleweed", "sle-micro", "sl-micro", "opensuse-microos", "suse-microos":
		return "iqn.1996-04.de.suse:01:"
	case "rhel", "centos", "fedora", "rocky", "almalinux", "ol", "amzn", "rhcos", "azurelinux", "mariner":
		return "iqn.1994-05.com.redhat:"
	}
	return "iqn.2016-04.com.open-iscsi:"
}

// initiatorName is a name no other node has: 48 random bits.
func initiatorName(osID string) string {
	var b [6]byte
	rand.Read(b[:]) // never fails, crypto/rand
	return initiatorPrefix(osID) + hex.EncodeToString(b[:])
}
