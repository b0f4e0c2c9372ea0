package rig

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sort"
	"strings"
)

// nodeFiles are laid over the machine's root file system as they are.
//
//go:embed all:node
var nodeFiles embed.FS

// imageRecipe is the code that makes the image, which must be made anew when it changes.
//
//go:embed image.go archive.go pause/main.go
var imageRecipe embed.FS

// NodeImage is the disk of a node that has never been booted, with its kernel.
type NodeImage struct {
	// Dir holds root.img, vmlinuz, initrd.img, ssh_key and known_hosts.
	Dir string
}

func (i NodeImage) path(name string) string { return filepath.Join(i.Dir, name) }

const (
	nodeRelease   = "trixie"
	nodeDiskBytes = 6 << 30
	pauseImage    = "localhost/pause:rig"
)

// nodePackages has no lsscsi, which is what the tests have the agent install,
// and no jq.
func nodePackages() []string {
	return []string{
		"systemd", "systemd-sysv", "dbus", "udev", "linux-image-amd64", "initramfs-tools", "zstd",
		"chrony", "open-iscsi", "multipath-tools", "tgt", "sg3-utils", "xfsprogs", "e2fsprogs",
		"containerd", "runc", "containernetworking-plugins", "iptables",
		"iproute2", "kmod", "openssh-server", "procps", "util-linux", "mount",
	}
}

// BuildNodeImage makes the node's disk image with mmdebstrap, or finds it in
// the cache. It takes about a minute and needs root.
func BuildNodeImage(ctx context.Context, tools Tools) (NodeImage, error) {
	var recipe []byte
	for _, files := range []fs.FS{nodeFiles, imageRecipe} {
		err := fs.WalkDir(files, ".", func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			data, err := fs.ReadFile(files, path)
			recipe = fmt.Appendf(recipe, "%s %d\n%s", path, len(data), data)
			return err
		})
		if err != nil {
			return NodeImage{}, fmt.Errorf("reading the node's recipe: %w", err)
		}
	}
	key := nodeRelease + "-" + digest(recipe, []byte(filepath.Base(tools.Dir)))
	dir, err := cached(ctx, "nodes", key, func(ctx context.Context, dir string) error {
		slog.InfoContext(ctx, "building the node's disk image", "release", nodeRelease)
		if os.Geteuid() != 0 {
			return errors.New("building the node's disk image needs root")
		}
		if err := buildNodeImage(ctx, dir, tools); err != nil {
			return fmt.Errorf("building the node's disk image: %w", err)
		}
		return nil
	})
	if err != nil {
		return NodeImage{}, err
	}
	return NodeImage{Dir: dir}, nil
}

func buildNodeImage(ctx context.Context, dir string, tools Tools) error {
	root := filepath.Join(dir, "root")
	if err := debootstrap(ctx, dir, root); err != nil {
		return err
	}
	if err := layNodeFiles(root); err != nil {
		return err
	}
	for _, program := range []string{"kubelet", "kube-proxy"} {
		if err := copyFile(filepath.Join(root, "usr/local/bin", program), tools.Path(program), 0o755); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Join(root, "var/lib/rig"), 0o755); err != nil {
		return err
	}
	if err := BuildPauseImage(ctx, filepath.Join(root, "var/lib/rig/pause.tar"), pauseImage); err != nil {
		return err
	}
	if err := sparseFile(filepath.Join(root, "var/lib/rig/iscsi.img"), 64<<20); err != nil {
		return err
	}
	if err := nodeKeys(ctx, dir, root); err != nil {
		return err
	}
	for _, d := range []string{"data", "spare", "etc/kubernetes/manifests"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	// An empty machine-id is filled from the kernel's command line without the
	// "first boot" work that a missing one would bring.
	if err := os.WriteFile(filepath.Join(root, "etc/machine-id"), nil, 0o444); err != nil {
		return err
	}
	enable := []string{"systemd-networkd", "rig-iscsi", "rig-images", "kubelet", "kube-proxy", "iscsid"}
	if _, err := run(ctx, "", nil, append([]string{"chroot", root, "systemctl", "enable"}, enable...)...); err != nil {
		return err
	}
	// Nothing may happen on this machine that the test did not cause.
	disable := []string{"apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer",
		"fstrim.timer", "xfs_scrub_all.timer", "e2scrub_reap.service", "getty@tty1.service"}
	if _, err := run(ctx, "", nil, append([]string{"chroot", root, "systemctl", "disable"}, disable...)...); err != nil {
		return err
	}
	for _, f := range []string{"vmlinuz", "initrd.img"} {
		if err := copyFile(filepath.Join(dir, f), filepath.Join(root, f), 0o644); err != nil {
			return err
		}
	}
	disk := filepath.Join(dir, "root.img")
	if err := sparseFile(disk, nodeDiskBytes); err != nil {
		return err
	}
	mkfs, err := lookPath("mkfs.ext4")
	if err != nil {
		return err
	}
	if _, err := run(ctx, "", nil, mkfs, "-q", "-F", "-L", "ROOT", "-d", root, disk); err != nil {
		return err
	}
	return os.RemoveAll(root)
}

// debootstrap installs Debian from the mirrors this machine's apt uses, with
// its proxy and other download settings.
func debootstrap(ctx context.Context, dir, root string) error {
	sources, err := nodeSources(ctx)
	if err != nil {
		return err
	}
	settings, err := run(ctx, "", nil, "apt-config", "dump", "--no-empty", "Acquire")
	if err != nil {
		return err
	}
	var kept []string
	for line := range strings.Lines(settings) {
		// The index targets differ between releases of apt.
		if !strings.HasPrefix(line, "Acquire::IndexTargets") {
			kept = append(kept, strings.TrimRight(line, "\n"))
		}
	}
	kept = append(kept, `Acquire::Languages "none";`)
	aptConf := filepath.Join(dir, "apt.conf")
	if err := os.WriteFile(aptConf, []byte(strings.Join(kept, "\n")+"\n"), 0o644); err != nil {
		return err
	}
	// The initrd is unpacked by an emulated processor: only what mounting the
	// root file system takes goes into it.
	const initrd = `mkdir -p "$1/etc/initramfs-tools/conf.d" &&
printf 'MODULES=list\nCOMPRESS=zstd\n' >"$1/etc/initramfs-tools/conf.d/rig" &&
printf 'virtio_pci\nvirtio_blk\next4\n' >"$1/etc/initramfs-tools/modules"`
	argv := []string{"mmdebstrap", "--mode=root", "--variant=minbase", "--aptopt=" + aptConf,
		// The package lists stay, so that the agent's remedies can install
		// without fetching them first.
		"--skip=cleanup/apt/lists",
		"--include=" + strings.Join(nodePackages(), ","),
		"--essential-hook=" + initrd,
		nodeRelease, root}
	if _, err := run(ctx, "", []string{"TMPDIR=" + dir}, append(argv, sources...)...); err != nil {
		return err
	}
	return os.Remove(aptConf)
}

// nodeSources are this machine's own Debian mirrors with the node's release.
func nodeSources(ctx context.Context) ([]string, error) {
	out, err := run(ctx, "", nil, "apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)",
		"Created-By: Packages", "Origin: Debian", "Component: main")
	if err != nil {
		return nil, fmt.Errorf("asking apt for its mirrors: %w", err)
	}
	found := map[string]bool{}
	for line := range strings.Lines(out) {
		label, uri, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok {
			continue
		}
		suites := []string{nodeRelease, nodeRelease + "-updates"}
		if strings.Contains(label, "Security") {
			suites = []string{nodeRelease + "-security"}
		}
		for _, suite := range suites {
			found[fmt.Sprintf("deb %s %s main", uri, suite)] = true
		}
	}
	if len(found) == 0 {
		return nil, errors.New("apt knows no Debian mirror; run apt-get update")
	}
	var sources []string
	for s := range found {
		sources = append(sources, s)
	}
	sort.Strings(sources)
	return sources, nil
}

func layNodeFiles(root string) error {
	return fs.WalkDir(nodeFiles, "node", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		to := filepath.Join(root, strings.TrimPrefix(path, "node"))
		if d.IsDir() {
			return os.MkdirAll(to, 0o755)
		}
		data, err := nodeFiles.ReadFile(path)
		if err != nil {
			return err
		}
		// The package may have put a link there, such as resolv.conf.
		if err := os.RemoveAll(to); err != nil {
			return err
		}
		return os.WriteFile(to, data, 0o644)
	})
}

// nodeKeys makes a key that opens this image only and notes the key by which
// the image proves itself.
func nodeKeys(ctx context.Context, dir, root string) error {
	key := filepath.Join(dir, "ssh_key")
	if _, err := run(ctx, "", nil, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "rig", "-f", key); err != nil {
		return err
	}
	public, err := os.ReadFile(key + ".pub")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(root, "root/.ssh"), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(root, "root/.ssh/authorized_keys"), public, 0o600); err != nil {
		return err
	}
	host, err := os.ReadFile(filepath.Join(root, "etc/ssh/ssh_host_ed25519_key.pub"))
	if err != nil {
		return err
	}
	// The port differs at each start; HostKeyAlias makes this line match.
	return os.WriteFile(filepath.Join(dir, "known_hosts"), append([]byte("rig-node "), host...), 0o644)
}

func sparseFile(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return err
	}
	return f.Close()
}

func copyFile(to, from string, mode fs.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	defer out.Close()
	if _, err := out.ReadFrom(in); err != nil {
		return err
	}
	return out.Close()
}
