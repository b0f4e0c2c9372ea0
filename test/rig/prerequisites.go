package rig

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// Prerequisites installs the Debian packages whose programs the rig runs and
// that are missing. It does nothing where all are present.
func Prerequisites(ctx context.Context) error {
	var missing []string
	for _, need := range []struct{ program, pkg string }{
		{"qemu-system-x86_64", "qemu-system-x86"},
		{"qemu-img", "qemu-utils"},
		{"mmdebstrap", "mmdebstrap"},
		{"chronyd", "chrony"},
		{"mkfs.ext4", "e2fsprogs"},
		{"ssh", "openssh-client"},
	} {
		if _, err := lookPath(need.program); err != nil {
			missing = append(missing, need.pkg)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	slog.InfoContext(ctx, "installing Debian packages", "packages", missing)
	// The chrony package would start a daemon that disciplines this machine's
	// clock. Only its program is wanted, so a unit that was not there before
	// is masked while it is installed, and stays masked: unmasking would start
	// it at the next boot.
	if slices.Contains(missing, "chrony") {
		const mask = "/etc/systemd/system/chrony.service"
		if err := os.MkdirAll(filepath.Dir(mask), 0o755); err != nil {
			return fmt.Errorf("keeping chrony from starting: %w", err)
		}
		if err := os.Symlink("/dev/null", mask); err != nil && !os.IsExist(err) {
			return fmt.Errorf("keeping chrony from starting: %w", err)
		}
	}
	env := []string{"DEBIAN_FRONTEND=noninteractive"}
	if _, err := run(ctx, "", env, "apt-get", "update"); err != nil {
		return fmt.Errorf("installing %s: %w", strings.Join(missing, ", "), err)
	}
	args := append([]string{"apt-get", "install", "-y", "--no-install-recommends"}, missing...)
	if _, err := run(ctx, "", env, args...); err != nil {
		return fmt.Errorf("installing %s: %w", strings.Join(missing, ", "), err)
	}
	return nil
}

// lookPath finds a program also where an unprivileged user's PATH has no sbin.
func lookPath(program string) (string, error) {
	if p, err := exec.LookPath(program); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if p := filepath.Join(dir, program); exists(p) {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s is not installed", program)
}
