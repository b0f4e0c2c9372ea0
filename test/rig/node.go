package rig

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hosthygiene/agent/test/pki"
)

// NodeOptions describe a node. The zero value is good.
type NodeOptions struct {
	// Name is the host's and the Node's name; node-1, node-2 and so on by
	// default.
	Name string
	// MemoryMiB is 2048 by default.
	MemoryMiB int
	// CPUs is 2 by default.
	CPUs int
	// Dir holds the node's disks and logs. By default it is a folder in the
	// control plane's; without a control plane it must be given.
	Dir string
	// Files are written to the node's file system early at boot: path to
	// content.
	Files map[string]string
}

// Node is a running virtual machine. Its disks, by what to call them in Unplug
// and by what the guest sees:
//
//	root    virtio serial ROOT, cannot be unplugged
//	data    virtio serial DATA, ext4, mounted at /data
//	spare   virtio serial SPARE, ext4, in fstab for /spare but not mounted
//	path-a  one of two SCSI paths to the LUN that is mpatha
//	path-b  the other
//
// The iSCSI disk is the guest's own: its tgtd serves iqn.2026-01.io.hosthygiene:rig
// on 127.0.0.1.
type Node struct {
	name       string
	dir        string
	sockets    string
	ip         string
	cp         *ControlPlane
	supervisor *supervisor
	remote     remote
	clock      *timeSource
	qemu       *process
	ports      nodePorts

	mu        sync.Mutex
	stopShare chan struct{}
	shareDone chan error
	stopped   bool
}

type nodePorts struct{ ssh, kubelet, metrics int }

// sparePorts are the empty PCIe slots for Plug.
func sparePorts() []string { return []string{"free-1", "free-2", "free-3", "free-4"} }

// disk is a disk that can be unplugged, in the words of QEMU's monitor, which
// are also those of its command line.
type disk struct {
	file   string
	size   int64
	block  map[string]any
	device map[string]any
}

// disks are the disks of every node beside its root.
func (n *Node) disks() []disk {
	data := n.virtioDisk("data", "DATA", "port-data", 256<<20)
	spare := n.virtioDisk("spare", "SPARE", "port-spare", 64<<20)
	all := []disk{data, spare}
	// Two controllers that show one file under one serial number and WWN are
	// two paths to one LUN.
	for _, p := range []string{"a", "b"} {
		block := blockNode("block-path-"+p, n.file("lun.img"))
		block["file"].(map[string]any)["locking"] = "off"
		all = append(all, disk{
			file: n.file("lun.img"), size: 64 << 20, block: block,
			device: map[string]any{"driver": "scsi-hd", "id": "path-" + p, "bus": "scsi-" + p + ".0", "drive": "block-path-" + p,
				"share-rw": true, "serial": "RIGLUN", "wwn": uint64(0x5000c500a1b2c3d4)},
		})
	}
	return all
}

// pluggedDisk is a disk of Plug, whose slot is not known yet.
func (n *Node) pluggedDisk(id string, size int64) disk {
	d := n.virtioDisk(id, id, "", size)
	d.file = n.file("plugged-" + id + ".img")
	d.block = blockNode("block-"+id, d.file)
	return d
}

func (n *Node) virtioDisk(id, serial, bus string, size int64) disk {
	file := n.file(id + ".img")
	return disk{
		file: file, size: size, block: blockNode("block-"+id, file),
		device: map[string]any{"driver": "virtio-blk-pci", "id": id, "bus": bus, "drive": "block-" + id, "serial": serial},
	}
}

// blockNode has no cache to lose: nothing here survives a crash of this machine
// anyway.
func blockNode(name, file string) map[string]any {
	return map[string]any{
		"driver": "raw", "node-name": name, "cache": map[string]any{"direct": false, "no-flush": true},
		"file": map[string]any{"driver": "file", "filename": file, "cache": map[string]any{"direct": false, "no-flush": true}},
	}
}

// StartNode boots a machine from the image and, given a control plane, waits
// until it is a Ready node of it. cp may be nil for a machine that is in no
// cluster. The caller must Stop it.
func StartNode(ctx context.Context, cp *ControlPlane, image NodeImage, opts NodeOptions) (*Node, error) {
	index := 1
	if cp != nil {
		cp.mu.Lock()
		cp.nodes++
		index = cp.nodes
		cp.mu.Unlock()
	}
	if opts.Name == "" {
		opts.Name = fmt.Sprintf("node-%d", index)
	}
	if opts.MemoryMiB == 0 {
		opts.MemoryMiB = 2048
	}
	if opts.CPUs == 0 {
		opts.CPUs = 2
	}
	if opts.Dir == "" {
		if cp == nil {
			return nil, fmt.Errorf("starting node %s: without a control plane NodeOptions.Dir must be given", opts.Name)
		}
		opts.Dir = cp.file(opts.Name)
	}
	n := &Node{name: opts.Name, dir: opts.Dir, cp: cp, supervisor: newSupervisor(), ip: fmt.Sprintf("10.0.2.%d", 14+index)}
	if err := n.start(ctx, image, opts); err != nil {
		return nil, fmt.Errorf("starting node %s: %w", n.name, errors.Join(err, n.Stop()))
	}
	return n, nil
}

func (n *Node) start(ctx context.Context, image NodeImage, opts NodeOptions) error {
	var err error
	if n.dir, err = filepath.Abs(n.dir); err != nil {
		return err
	}
	if err := os.MkdirAll(n.dir, 0o755); err != nil {
		return err
	}
	// The path of a Unix socket may have 107 bytes, and test folders are deep.
	if n.sockets, err = os.MkdirTemp("", "rig-"); err != nil {
		return err
	}
	ports, err := freePorts(4)
	if err != nil {
		return err
	}
	n.ports = nodePorts{ssh: ports[0], kubelet: ports[1], metrics: ports[2]}
	n.clock = &timeSource{dir: n.dir, supervisor: n.supervisor, port: ports[3]}
	if err := n.clock.start(); err != nil {
		return err
	}
	n.remote = remote{port: n.ports.ssh, key: image.path("ssh_key"), known: image.path("known_hosts"),
		control: filepath.Join(n.sockets, "ssh")}
	if err := n.makeDisks(ctx, image); err != nil {
		return err
	}
	if err := n.writeCredentials(opts.Files); err != nil {
		return err
	}
	argv, err := n.qemuArgs(ctx, image, opts)
	if err != nil {
		return err
	}
	begun := time.Now()
	if n.qemu, err = n.supervisor.start(n.dir, "qemu", argv...); err != nil {
		return err
	}
	if err := n.WaitSSH(ctx); err != nil {
		return err
	}
	slog.InfoContext(ctx, "the node answers", "node", n.name, "after", time.Since(begun).Round(time.Second))
	if n.cp == nil {
		return nil
	}
	n.cp.egress.route(n.ip+":10250", fmt.Sprintf("127.0.0.1:%d", n.ports.kubelet))
	n.cp.egress.route(n.ip+":20266", fmt.Sprintf("127.0.0.1:%d", n.ports.metrics)) // pods/proxy
	if err := n.WaitReady(ctx); err != nil {
		return err
	}
	slog.InfoContext(ctx, "the node is Ready", "node", n.name, "after", time.Since(begun).Round(time.Second))
	return nil
}

func (n *Node) makeDisks(ctx context.Context, image NodeImage) error {
	// An overlay per run leaves the image as it was built.
	if _, err := run(ctx, "", nil, "qemu-img", "create", "-q", "-f", "qcow2",
		"-b", image.path("root.img"), "-F", "raw", n.file("root.qcow2")); err != nil {
		return err
	}
	mkfs, err := lookPath("mkfs.ext4")
	if err != nil {
		return err
	}
	for _, d := range n.disks() {
		if err := sparseFile(d.file, d.size); err != nil {
			return err
		}
		if d.device["driver"] != "virtio-blk-pci" {
			continue
		}
		if _, err := run(ctx, "", nil, mkfs, "-q", "-F", "-L", d.device["serial"].(string), d.file); err != nil {
			return err
		}
	}
	return nil
}

func (n *Node) file(name string) string { return filepath.Join(n.dir, name) }

// writeCredentials prepares the files that systemd-tmpfiles writes in the guest
// before services start, so that the node joins by itself while it boots.
func (n *Node) writeCredentials(extra map[string]string) error {
	files := map[string]string{
		// Polled often, so that a lost source is noticed within a test.
		"/etc/chrony/sources.d/rig.sources": fmt.Sprintf("server %s port %d iburst minpoll 1 maxpoll 2\n", hostFromGuest, n.clock.port),
	}
	if n.cp != nil {
		server := fmt.Sprintf("https://%s:%d", hostFromGuest, n.cp.port)
		kubelet := n.cp.ca.Issue("system:node:"+n.name, pki.Of("system:nodes"))
		proxy := n.cp.ca.Issue("system:kube-proxy")
		files["/etc/kubernetes/pki/ca.crt"] = string(n.cp.ca.CertPEM())
		files["/etc/kubernetes/kubelet.conf"] = string(kubeconfig(n.cp.ca, server, "default-auth", kubelet))
		files["/etc/kubernetes/kube-proxy.conf"] = string(kubeconfig(n.cp.ca, server, "default", proxy))
	}
	for path, content := range extra {
		files[path] = content
	}
	var lines strings.Builder
	for path, content := range files {
		mode := "0600"
		if strings.HasPrefix(path, "/etc/chrony/") { // read by _chrony
			mode = "0644"
		}
		fmt.Fprintf(&lines, "f+~ %s %s root root - %s\n", path, mode, base64.StdEncoding.EncodeToString([]byte(content)))
	}
	return os.WriteFile(n.file("tmpfiles.extra"), []byte(lines.String()), 0o600)
}

func (n *Node) qemuArgs(ctx context.Context, image NodeImage, opts NodeOptions) ([]string, error) {
	accel, err := accelerator(ctx, image)
	if err != nil {
		return nil, err
	}
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return nil, err
	}
	forward := func(host, guest int) string { return fmt.Sprintf(",hostfwd=tcp:127.0.0.1:%d-:%d", host, guest) }
	argv := append([]string{"qemu-system-x86_64", "-name", n.name, "-machine", "q35", "-nodefaults", "-display", "none"}, accel...)
	argv = append(argv,
		"-m", strconv.Itoa(opts.MemoryMiB), "-smp", strconv.Itoa(opts.CPUs),
		"-kernel", image.path("vmlinuz"), "-initrd", image.path("initrd.img"),
		// By id, because with several virtio disks the root is not always vda.
		// QEMU's emulator now and then runs an int3 that the kernel has patched away
		// by then, and the kernel panics over it in its boot: it boots again, after
		// as long as the kubelet sets it to.
		"-append", strings.Join([]string{"root=/dev/disk/by-id/virtio-ROOT rw console=ttyS0 net.ifnames=0 mitigations=off panic=10",
			"systemd.hostname=" + n.name, "systemd.machine_id=" + hex.EncodeToString(id), "systemd.getty_auto=no"}, " "),
		"-serial", "file:"+n.Console(),
		"-qmp", "unix:"+n.qmpSocket()+",server=on,wait=off",
		"-fw_cfg", "name=opt/io.systemd.credentials/tmpfiles.extra,file="+n.file("tmpfiles.extra"),
		"-device", "virtio-rng-pci",
		"-netdev", "user,id=net0,ipv6=off,dhcpstart="+n.ip+
			forward(n.ports.ssh, 22)+forward(n.ports.kubelet, 10250)+forward(n.ports.metrics, 20266),
		"-device", "virtio-net-pci,netdev=net0",
		// Nothing here has to survive a crash of this machine.
		"-drive", "id=root,if=none,format=qcow2,cache=unsafe,file="+n.file("root.qcow2"),
		"-device", "virtio-blk-pci,drive=root,serial=ROOT",
	)
	// q35's own bus refuses hot-unplug; a root port takes it.
	for i, port := range append([]string{"data", "spare"}, sparePorts()...) {
		argv = append(argv, "-device", fmt.Sprintf("pcie-root-port,id=port-%s,chassis=%d,slot=%d", port, i+1, i+1))
	}
	for _, p := range []string{"a", "b"} {
		argv = append(argv, "-device", "virtio-scsi-pci,id=scsi-"+p)
	}
	for _, d := range n.disks() {
		block, err := json.Marshal(d.block)
		if err != nil {
			return nil, err
		}
		device, err := json.Marshal(d.device)
		if err != nil {
			return nil, err
		}
		argv = append(argv, "-blockdev", string(block), "-device", string(device))
	}
	return argv, nil
}

// WaitSSH waits until commands can be run on the node, at its start or after a
// test restarted it.
func (n *Node) WaitSSH(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	if err := n.qemu.until(ctx, "sshd of "+n.name, 300*time.Millisecond, n.remote.banner); err != nil {
		return fmt.Errorf("%w\nthe end of its console:\n%s", err, tail(n.Console(), 20))
	}
	n.mu.Lock()
	if n.supervisor != nil && n.stopShare == nil {
		n.stopShare, n.shareDone = make(chan struct{}), make(chan error, 1)
		go func() { n.shareDone <- n.remote.share(n.supervisor, n.dir, n.stopShare) }()
	}
	n.mu.Unlock()
	return n.qemu.until(ctx, "the connection to "+n.name, 300*time.Millisecond, n.remote.connected)
}

// WaitReady waits until the API server calls the node Ready.
func (n *Node) WaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	return n.qemu.until(ctx, n.name+" to be Ready", 500*time.Millisecond, func(ctx context.Context) error {
		body, err := n.cp.get(ctx, "/api/v1/nodes/"+n.name)
		if err != nil {
			return err
		}
		var node struct {
			Status struct {
				Conditions []struct{ Type, Status, Message string }
			}
		}
		if err := json.Unmarshal(body, &node); err != nil {
			return fmt.Errorf("reading the node: %w", err)
		}
		for _, c := range node.Status.Conditions {
			if c.Type == "Ready" {
				if c.Status == "True" {
					return nil
				}
				return fmt.Errorf("the node is not Ready (%s): %s", c.Status, c.Message)
			}
		}
		return errors.New("the node has no Ready condition")
	})
}

// Name is the node's name.
func (n *Node) Name() string { return n.name }

// Dir is the folder of the node's disks and logs.
func (n *Node) Dir() string { return n.dir }

// Console is the file the guest's kernel and systemd write to.
func (n *Node) Console() string { return n.file("console.log") }

// KubeletPort is the port of 127.0.0.1 that leads to the kubelet's 10250.
func (n *Node) KubeletPort() int { return n.ports.kubelet }

// MetricsPort is the port of 127.0.0.1 that leads to the agent's 20266.
func (n *Node) MetricsPort() int { return n.ports.metrics }

// Run runs a shell script on the node as root and returns its standard output.
// The error carries what it wrote to standard error.
func (n *Node) Run(ctx context.Context, script string) (string, error) {
	return output(n.Command(ctx, script))
}

// RunArgs runs one program on the node, without a shell's interpretation.
func (n *Node) RunArgs(ctx context.Context, argv ...string) (string, error) {
	words := make([]string, len(argv))
	for i, a := range argv {
		words[i] = quote(a)
	}
	return n.Run(ctx, strings.Join(words, " "))
}

// Command prepares a shell script to be run on the node, for callers that give
// it input or read its output as it comes.
func (n *Node) Command(ctx context.Context, script string) *exec.Cmd {
	return n.remote.command(ctx, script)
}

// SSHArgs is the ssh command line for a person, who may append a command.
func (n *Node) SSHArgs() []string { return append([]string{"ssh"}, n.remote.args()...) }

// Write writes a file on the node.
func (n *Node) Write(ctx context.Context, remotePath string, mode os.FileMode, content io.Reader) error {
	script := fmt.Sprintf("mkdir -p %s && cat >%[2]s.new && chmod %[3]o %[2]s.new && mv %[2]s.new %[2]s",
		quote(filepath.Dir(remotePath)), quote(remotePath), mode.Perm())
	cmd := n.Command(ctx, script)
	cmd.Stdin = content
	if _, err := output(cmd); err != nil {
		return fmt.Errorf("writing %s on %s: %w", remotePath, n.name, err)
	}
	return nil
}

// Copy copies a file of this machine to the node, with its mode.
func (n *Node) Copy(ctx context.Context, local, remotePath string) error {
	f, err := os.Open(local)
	if err != nil {
		return fmt.Errorf("copying to %s: %w", n.name, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("copying to %s: %w", n.name, err)
	}
	return n.Write(ctx, remotePath, info.Mode(), f)
}

// LoadImage makes a container image archive of this machine known to the node's
// container runtime.
func (n *Node) LoadImage(ctx context.Context, archive string) error {
	f, err := os.Open(archive)
	if err != nil {
		return fmt.Errorf("loading an image on %s: %w", n.name, err)
	}
	defer f.Close()
	cmd := n.Command(ctx, "ctr --namespace k8s.io images import -")
	cmd.Stdin = f
	if _, err := output(cmd); err != nil {
		return fmt.Errorf("loading %s on %s: %w", archive, n.name, err)
	}
	return nil
}

func (n *Node) qmpSocket() string { return filepath.Join(n.sockets, "qmp") }

// QMP sends QEMU a command and returns its answer.
func (n *Node) QMP(ctx context.Context, command string, args any) (json.RawMessage, error) {
	m, err := dialMonitor(ctx, n.qmpSocket())
	if err != nil {
		return nil, err
	}
	defer m.conn.Close()
	return m.execute(command, args)
}

// Unplug takes a disk away, as pulling it out would, and waits until the guest
// has let go of it. Replug puts it back with its content, unless it came from
// Plug: then it is thrown away.
func (n *Node) Unplug(ctx context.Context, id string) error {
	m, err := dialMonitor(ctx, n.qmpSocket())
	if err != nil {
		return err
	}
	defer m.conn.Close()
	if _, err := m.execute("device_del", map[string]any{"id": id}); err != nil {
		return err
	}
	err = m.event("DEVICE_DELETED", func(data json.RawMessage) bool {
		var event struct{ Device string }
		return json.Unmarshal(data, &event) == nil && event.Device == id
	})
	if err != nil {
		return err
	}
	for _, d := range n.disks() {
		if d.device["id"] == id {
			return nil // what is on it stays, for Replug
		}
	}
	d := n.pluggedDisk(id, 0)
	if _, err := m.execute("blockdev-del", map[string]any{"node-name": d.block["node-name"]}); err != nil {
		return err
	}
	return os.Remove(d.file)
}

// Replug puts a disk back that Unplug took away, with its content.
func (n *Node) Replug(ctx context.Context, id string) error {
	for _, d := range n.disks() {
		if d.device["id"] == id {
			_, err := n.QMP(ctx, "device_add", d.device)
			return err
		}
	}
	return fmt.Errorf("a node has no disk called %s", id)
}

// Plug puts in a new empty virtio disk. The id is its serial number, under which
// it appears in the guest's /dev/disk/by-id/virtio-ID, and what to call it in
// Unplug. A machine has room for four at a time.
func (n *Node) Plug(ctx context.Context, id string, size int64) error {
	m, err := dialMonitor(ctx, n.qmpSocket())
	if err != nil {
		return err
	}
	defer m.conn.Close()
	d := n.pluggedDisk(id, size)
	if err := sparseFile(d.file, d.size); err != nil {
		return fmt.Errorf("plugging %s: %w", id, err)
	}
	if _, err := m.execute("blockdev-add", d.block); err != nil {
		return fmt.Errorf("plugging %s: %w", id, err)
	}
	for _, port := range sparePorts() {
		d.device["bus"] = "port-" + port
		// Only QEMU knows which slots are taken: several programs may talk to it.
		if _, err = m.execute("device_add", d.device); err == nil {
			return nil
		}
	}
	return fmt.Errorf("plugging %s: no slot took it: %w", id, err)
}

// StopTimeSource makes the node's only NTP server unreachable.
func (n *Node) StopTimeSource() error {
	if n.clock == nil {
		return fmt.Errorf("stopping the time source: %w", errNotOurs)
	}
	return n.clock.stop()
}

// StartTimeSource brings it back.
func (n *Node) StartTimeSource() error {
	if n.clock == nil {
		return fmt.Errorf("starting the time source: %w", errNotOurs)
	}
	return n.clock.start()
}

// Stop switches the machine off, without letting it shut down, and removes its
// disks. Logs stay. It may be called twice.
func (n *Node) Stop() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.stopped {
		return nil
	}
	n.stopped = true
	var errs []error
	if n.stopShare != nil {
		close(n.stopShare)
		errs = append(errs, <-n.shareDone)
	}
	errs = append(errs, n.qemu.stop(5*time.Second))
	if n.clock != nil {
		errs = append(errs, n.clock.stop())
	}
	n.supervisor.close()
	if n.cp != nil && n.cp.egress != nil {
		n.cp.egress.unroute(n.ip + ":10250")
		n.cp.egress.unroute(n.ip + ":20266")
	}
	if n.sockets != "" {
		errs = append(errs, os.RemoveAll(n.sockets))
	}
	plugged, err := filepath.Glob(n.file("plugged-*.img"))
	errs = append(errs, err)
	for _, file := range plugged {
		errs = append(errs, os.Remove(file))
	}
	for _, d := range append(n.disks(), disk{file: n.file("root.qcow2")}, disk{file: n.file("tmpfiles.extra")}) {
		if err := os.Remove(d.file); err != nil && !os.IsNotExist(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
