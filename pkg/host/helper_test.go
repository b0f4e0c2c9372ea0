package host

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test binary plays other processes: what this variable names is run instead
// of the tests.
const helperVariable = "HOST_TEST_HELPER"

// init keeps the first thread for the one who ends it.
func init() {
	if strings.HasPrefix(os.Getenv(helperVariable), "remains ") {
		runtime.GOMAXPROCS(4)
		runtime.LockOSThread()
	}
}

func TestMain(m *testing.M) {
	switch mode, arg, _ := strings.Cut(os.Getenv(helperVariable), " "); mode {
	case "":
		os.Exit(m.Run())
	case "init":
		fatal(playInit(arg))
	case "lock":
		fatal(playLock(arg))
	case "claim", "remains":
		fatal(playClaim(arg, mode == "remains"))
	case "storm":
		fatal(playStorm(arg))
	case "watches":
		fatal(playWatches(arg))
	}
	os.Exit(0)
}

func fatal(err error) {
	if err != nil {
		fmt.Println("helper:", err)
		os.Exit(1)
	}
}

func needsRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make namespaces and mounts")
	}
}

// helper starts the test binary in another role and waits until it is ready; it
// ends with the test.
func helper(t testing.TB, role string, attr *syscall.SysProcAttr) *os.Process {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), helperVariable+"="+role)
	cmd.SysProcAttr = attr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		cmd.Process.Kill()
		cmd.Wait()
	})
	line, _ := bufio.NewReader(stdout).ReadString('\n')
	if line != "ready\n" {
		t.Fatalf("the helper said %q", line)
	}
	return cmd.Process
}

// ready tells the test that all is set up and waits for its end.
func ready() error {
	fmt.Println("ready")
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

func playLock(name string) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
		return err
	}
	return ready()
}

// playInit is PID 1 of another host: it lives in namespaces of its own, with
// mounts and sockets that only they show. cgroup is what lies on /sys/fs/cgroup
// there: "unified" or what was there.
func playInit(cgroup string) error {
	mount := func(source, target, fsType string) error {
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		return os.NewSyscallError("mount "+target, unix.Mount(source, target, fsType, 0, ""))
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := errors.Join(mount("tmpfs", "/mnt", "tmpfs"), mount("tmpfs", "/run", "tmpfs")); err != nil {
		return err
	}
	var sfs unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &sfs); err != nil {
		return err
	}
	if cgroup == "unified" && sfs.Type != unix.CGROUP2_SUPER_MAGIC {
		if err := mount("none", "/sys/fs/cgroup", "cgroup2"); err != nil {
			return err
		}
	}
	if err := os.WriteFile("/mnt/only-here", []byte("seen\n"), 0o644); err != nil {
		return err
	}
	if err := os.Symlink("/mnt/only-here", "/mnt/absolute"); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte("foreign")); err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	if err := os.MkdirAll("/run/chrony", 0o700); err != nil {
		return err
	}
	udp, err := net.ListenPacket("udp", "127.0.0.1:323")
	if err != nil {
		return err
	}
	go echoPackets(udp, nil)
	gram, err := net.ListenPacket("unixgram", "/run/chrony/chronyd.sock")
	if err != nil {
		return err
	}
	go echoPackets(gram, func(from net.Addr) string {
		st, err := os.Lstat(from.String())
		if err != nil {
			return err.Error()
		}
		return from.String() + " " + st.Mode().Perm().String()
	})
	for _, name := range []string{"@host-hygiene-test", "/run/stream.sock"} {
		l, err := net.Listen("unix", name)
		if err != nil {
			return err
		}
		go echoStreams(l)
	}
	return ready()
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

func echoPackets(c net.PacketConn, answer func(from net.Addr) string) {
	buf := make([]byte, 2048)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		reply := string(buf[:n])
		if answer != nil {
			reply = answer(from)
		}
		c.WriteTo([]byte(reply), from)
	}
}

func echoStreams(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			io.Copy(c, c)
		}()
	}
}

// openForeign opens a host whose PID 1 is a process in namespaces of its own.
func openForeign(t testing.TB, cgroup string) *Host {
	t.Helper()
	needsRoot(t)
	p := helper(t, "init "+cgroup, &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
	})
	h, err := Open(Options{init: p.Pid})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

// within is a context for a call that must not take long.
func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// deadMount mounts a file system whose server never answers on dir. revive ends
// its connection, upon which all that wait for it get an error.
func deadMount(t testing.TB, dir string) (revive func()) {
	t.Helper()
	needsRoot(t)
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("needs a kernel with FUSE: %v", err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)
	if err := unix.Mount("dead", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		unix.Close(fd)
		t.Fatalf("mount: %v", err)
	}
	revived := false
	revive = func() {
		if !revived {
			revived = true
			unix.Close(fd)
		}
	}
	t.Cleanup(func() {
		revive()
		unix.Unmount(dir, unix.MNT_DETACH)
	})
	return revive
}

// openDir opens a directory as if it were the host's root, with our namespaces.
func openDir(t testing.TB, dir string) *Host {
	t.Helper()
	h, err := Open(Options{Root: dir, init: os.Getpid()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

// writeTree writes files below dir, by host path.
func writeTree(t testing.TB, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// eventually waits for what other threads do in their own time.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after 10 s still not: %s", what)
		}
	}
}
