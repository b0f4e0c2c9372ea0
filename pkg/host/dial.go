package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Dial implements [View].
func (h *Host) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	what := network + " " + address
	fail := func(err error) (net.Conn, error) {
		var op *net.OpError
		if errors.As(err, &op) { // its address is a detail of how we got there
			err = op.Err
		}
		return nil, &net.OpError{Op: "dial", Net: network, Addr: hostAddr{network, address}, Err: err}
	}
	dial, err := h.dialer(network, address)
	if err != nil {
		return fail(err)
	}
	conn, err := bound(ctx, &h.calls, what, func(c net.Conn) { c.Close() }, func() (net.Conn, error) { return dial(ctx) })
	if err != nil {
		return fail(err)
	}
	return withContext(ctx, conn, hostAddr{network, address}), nil
}

// dialer chooses how to reach an address; the function it returns may block.
func (h *Host) dialer(network, address string) (func(context.Context) (net.Conn, error), error) {
	unixSocket := network == "unix" || network == "unixgram"
	switch {
	case unixSocket && strings.HasPrefix(address, "@"):
		return func(ctx context.Context) (net.Conn, error) {
			conn, err := h.dialInNet(ctx, network, address)
			if err == nil && network == "unix" {
				if err = rootsSocket(conn); err != nil {
					conn.Close()
					return nil, err
				}
			}
			return conn, err
		}, nil
	case network == "unix" && path.IsAbs(address):
		return func(ctx context.Context) (net.Conn, error) { return h.dialPath(ctx, address) }, nil
	case network == "unixgram" && path.IsAbs(address) && h.observe:
		return nil, fmt.Errorf("a client socket beside it: %w", errObserves)
	case network == "unixgram" && path.IsAbs(address):
		return func(ctx context.Context) (net.Conn, error) { return h.dialBound(ctx, address) }, nil
	case unixSocket:
		return nil, fmt.Errorf("%q is neither an absolute path nor an abstract name", address)
	}
	switch network {
	case "udp", "udp4", "udp6", "tcp", "tcp4", "tcp6":
	default:
		return nil, net.UnknownNetworkError(network)
	}
	// A name would be resolved by goroutines outside the host's namespace.
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, err
	}
	return func(ctx context.Context) (net.Conn, error) { return h.dialInNet(ctx, network, address) }, nil
}

// dialInNet makes a socket in the host's network namespace: it belongs to the
// namespace of the thread that calls socket(2), and the dialer does that on the
// calling goroutine for a literal address.
func (h *Host) dialInNet(ctx context.Context, network, address string) (conn net.Conn, err error) {
	var d net.Dialer
	dial := func() error {
		conn, err = d.DialContext(ctx, network, address)
		return err
	}
	if !h.ns.differs(unix.CLONE_NEWNET) {
		return conn, dial()
	}
	err = h.ns.do(unix.CLONE_NEWNET, dial)
	return conn, err
}

// rootsSocket refuses what is not served by root, or by ourselves: an abstract
// name has no owner and no mode, and belongs to whoever takes it first in the
// network namespace, unlike the path of a socket.
func rootsSocket(conn net.Conn) error {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if credErr != nil {
		return os.NewSyscallError("SO_PEERCRED", credErr)
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("the socket is served by user %d, not by root", cred.Uid)
	}
	return nil
}

// dialPath connects to a stream socket inside the root. The name given to
// connect(2) is that of the open descriptor: it can not lead out of the root and
// always fits into the 108 bytes of sun_path. Sockets with a path belong to no
// network namespace.
func (h *Host) dialPath(ctx context.Context, name string) (net.Conn, error) {
	fd, err := h.openSocket(name)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var d net.Dialer
	return d.DialContext(ctx, "unix", fdName(fd))
}

func (h *Host) openSocket(name string) (int, error) {
	fd, err := h.open(name, unix.O_PATH)
	if err != nil {
		return -1, os.NewSyscallError("connect", err)
	}
	st, err := fstat(fd)
	if err == nil && st.Mode.Type() != fs.ModeSocket {
		err = errors.New("not a socket")
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// Client sockets are named by process and a running number; what a process left
// behind that was killed is told from those in use by connecting to it.
const (
	clientPrefix = "host-hygiene-"
	clientSuffix = ".sock"
)

// clientNumber makes client names unique within the process.
var clientNumber atomic.Uint64

// dialBound connects a datagram socket that has a name beside the server's. The
// server answers to the name as the kernel recorded it at bind(2), so it must be
// bound under the path the server sees, in the host's mount namespace.
func (h *Host) dialBound(ctx context.Context, server string) (conn net.Conn, err error) {
	fd, err := h.openSocket(server)
	if err != nil {
		return nil, err
	}
	unix.Close(fd)
	parent := path.Dir(path.Clean(server))
	dir, err := h.open(parent, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: parent, Err: err}
	}
	h.sweepClients(ctx, parent)
	base := fmt.Sprintf("%s%d-%d%s", clientPrefix, os.Getpid(), clientNumber.Add(1), clientSuffix)
	local, remote := path.Join(parent, base), server
	if !h.ns.differs(unix.CLONE_NEWNS) { // the tree lies elsewhere in our own
		local, remote = path.Join(h.Path(), local), path.Join(h.Path(), remote)
	}
	if len(local) >= 108 || len(remote) >= 108 {
		unix.Close(dir)
		return nil, fmt.Errorf("%s is longer than the 107 bytes of a socket's name", local)
	}
	cleanup := func() {
		unix.Unlinkat(dir, base, 0)
		unix.Close(dir)
	}
	err = h.ns.do(unix.CLONE_NEWNS, func() error {
		// The mode comes from the umask, which is this thread's own here. A
		// chmod(2) by name could be led to another file by whoever owns the
		// directory, and chronyd's is not root's.
		defer unix.Umask(unix.Umask(0o111))
		d := net.Dialer{LocalAddr: &net.UnixAddr{Net: "unixgram", Name: local}}
		conn, err = d.DialContext(ctx, "unixgram", remote)
		return err
	})
	if err != nil {
		cleanup()
		return nil, err
	}
	return &hostConn{Conn: conn, cleanup: cleanup}, nil
}

// sweepClients removes the client sockets of agents that were killed before they
// could. It is a courtesy: what goes wrong shows with the next bind.
func (h *Host) sweepClients(ctx context.Context, parent string) {
	var scratch []byte
	names, err := h.readDir(parent, &scratch)
	if err != nil {
		return
	}
	for _, name := range names {
		if !strings.HasPrefix(name, clientPrefix) || !strings.HasSuffix(name, clientSuffix) {
			continue
		}
		fd, err := h.open(path.Join(parent, name), unix.O_PATH|unix.O_NOFOLLOW)
		if err != nil {
			continue
		}
		if st, err := fstat(fd); err == nil && st.Mode.Type() == fs.ModeSocket {
			var d net.Dialer
			c, err := d.DialContext(ctx, "unixgram", fdName(fd))
			switch {
			case err == nil:
				c.Close()
			case errors.Is(err, unix.ECONNREFUSED):
				if dir, err := h.open(parent, unix.O_PATH|unix.O_DIRECTORY); err == nil {
					unix.Unlinkat(dir, name, 0)
					unix.Close(dir)
				}
			}
		}
		unix.Close(fd)
	}
}

// hostConn is a connection that ends with the context it was dialled under.
type hostConn struct {
	net.Conn
	remote  net.Addr
	stop    func() bool
	cleanup func()
	once    sync.Once
}

func withContext(ctx context.Context, conn net.Conn, remote net.Addr) net.Conn {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(defaultLimit)
	}
	conn.SetDeadline(deadline)
	c := &hostConn{Conn: conn, remote: remote}
	c.stop = context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	return c
}

// RemoteAddr is the address that was dialled.
func (c *hostConn) RemoteAddr() net.Addr {
	if c.remote != nil {
		return c.remote
	}
	return c.Conn.RemoteAddr()
}

// Close closes the connection and removes what was made for it.
func (c *hostConn) Close() error {
	if c.stop != nil {
		c.stop()
	}
	err := c.Conn.Close()
	if c.cleanup != nil {
		c.once.Do(c.cleanup)
	}
	return err
}

type hostAddr struct{ network, address string }

func (a hostAddr) Network() string { return a.network }
func (a hostAddr) String() string  { return a.address }
