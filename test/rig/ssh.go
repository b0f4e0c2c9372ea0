package rig

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// remote runs commands on the node. All of them share one connection, because
// an emulated processor takes seconds for each handshake.
type remote struct {
	port    int
	key     string
	known   string
	control string // the socket of the shared connection
}

// args are ssh's options for the node, the destination last.
func (r remote) args() []string {
	return []string{"-F", "/dev/null", "-p", strconv.Itoa(r.port), "-i", r.key, "-S", r.control,
		"-o", "ControlMaster=no", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR",
		"-o", "UserKnownHostsFile=" + r.known, "-o", "HostKeyAlias=rig-node", "-o", "StrictHostKeyChecking=yes",
		// The cheapest for a processor without help for either.
		"-o", "KexAlgorithms=curve25519-sha256", "-o", "Ciphers=chacha20-poly1305@openssh.com",
		"-o", "HostKeyAlgorithms=ssh-ed25519", "-o", "ConnectTimeout=30", "-o", "ServerAliveInterval=15",
		"root@127.0.0.1"}
}

func (r remote) command(ctx context.Context, script string) *exec.Cmd {
	return exec.CommandContext(ctx, "ssh", append(r.args(), script)...)
}

// banner says whether sshd answers. QEMU accepts connections long before the
// guest has a network, so that connecting alone says nothing.
func (r remote) banner(ctx context.Context) error {
	d := net.Dialer{Timeout: 2 * time.Second}
	conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(r.port)))
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return err
	}
	greeting := make([]byte, 4)
	if _, err := io.ReadFull(conn, greeting); err != nil {
		return fmt.Errorf("no greeting from sshd: %w", err)
	}
	return nil
}

// connected says whether the shared connection stands.
func (r remote) connected(ctx context.Context) error {
	_, err := run(ctx, "", nil, append([]string{"ssh", "-O", "check"}, r.args()...)...)
	return err
}

// share keeps the shared connection open until stop is closed, also over a
// restart of the guest. It returns when the last ssh has ended.
func (r remote) share(s *supervisor, dir string, stop <-chan struct{}) error {
	argv := append([]string{"ssh", "-N", "-M", "-o", "ControlMaster=yes"}, r.args()...)
	for {
		// A dead master leaves its socket, and the next would not replace it.
		if err := os.Remove(r.control); err != nil && !os.IsNotExist(err) {
			return fmt.Errorf("sharing the connection to the node: %w", err)
		}
		p, err := s.start(dir, "ssh", argv...)
		if err != nil {
			return err
		}
		select {
		case <-stop:
			return p.stop(2 * time.Second)
		case <-p.done:
		}
		select {
		case <-stop:
			return nil
		case <-time.After(time.Second):
		}
	}
}

// quote makes a word safe for the node's shell.
func quote(word string) string { return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'" }
