package probes

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/hosthygiene/agent/pkg/finding"
)

// identities are names that no two machines may share, and that machines made
// from one image or one template do share. One node can not see that: each
// publishes hashes, and an alert finds the pair. The iSCSI initiator's name has a
// metric of its own, from the iscsi probe.
var identities = []struct{ kind, file string }{
	{"machine-id", "/etc/machine-id"},                  // machine-id(5)
	{"nvme-hostnqn", "/etc/nvme/hostnqn"},              // nvme-gen-hostnqn(1)
	{"product-uuid", "/sys/class/dmi/id/product_uuid"}, // SMBIOS 7.2.1, root's alone
}

// sampleIdentities adds the hash of each identity this host has.
func sampleIdentities(ctx context.Context, in Input, r *finding.Result) error {
	var errs []error
	for _, id := range identities {
		data, err := remembered(in, id.file, struct{}{}, func() ([]byte, error) { return in.Host.ReadFileMax(ctx, id.file, 4<<10) })
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
		case err != nil:
			errs = append(errs, fmt.Errorf("the host's identity: %w", err))
		default:
			if value := parseIdentity(data); value != "" {
				r.Sample("hosthygiene_identity_info", 1, "kind", id.kind, "hash", identityHash(value))
			}
		}
	}
	return errors.Join(errs...)
}

// identityHash is short enough for a label, and tells nothing of the name.
func identityHash(name string) string {
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:6])
}

// parseIdentity returns the name in a file of one line; empty when it identifies
// nothing: a file that awaits the first boot, a UUID that the firmware was never
// given. Letters are made small, as firmware and tools differ in that.
func parseIdentity(data []byte) string {
	line, _, _ := bytes.Cut(bytes.TrimSpace(data), []byte("\n"))
	value := strings.ToLower(string(bytes.TrimSpace(line)))
	switch value {
	case "uninitialized", // machine-id(5): to be set at the first boot
		"not settable", "not present", "not specified", // dmidecode's words, in some firmware itself
		"03000200-0400-0500-0006-000700080009", // AMI's sample data, left as it was by many boards
		"00020003-0004-0005-0006-000700080009", // the same in the byte order before SMBIOS 2.6
		"12345678-1234-5678-90ab-cddeefaabbcc": // another sample, on small boards
		return ""
	}
	// SMBIOS 7.2.1: all zero is "not present", all one "not present, but may be set".
	if strings.Trim(value, "0-") == "" || strings.Trim(value, "f-") == "" {
		return ""
	}
	return value
}
