// Command cluster keeps a real Kubernetes cluster with one real node on this
// machine, for a person to try things on.
//
//	go run ./test/cluster up
//	go run ./test/cluster status
//	go run ./test/cluster kubectl get nodes
//	go run ./test/cluster ssh multipath -ll
//	go run ./test/cluster load IMAGE.tar
//	go run ./test/cluster down
//
// The environment variable CLUSTER names one of several; "default" otherwise.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/hosthygiene/agent/test/rig"
)

const usage = "usage: cluster up | down | status | ssh [COMMAND...] | kubectl ARGUMENTS... | load IMAGE.tar"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:])
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New(usage)
	}
	cache, err := rig.CacheDir()
	if err != nil {
		return err
	}
	name := os.Getenv("CLUSTER")
	if name == "" {
		name = "default"
	}
	c := cluster{dir: filepath.Join(cache, "run", name)}
	switch command, rest := args[0], args[1:]; command {
	case "up":
		return c.up(ctx)
	case "serve": // what up leaves behind
		return c.serve(ctx)
	case "down":
		return c.down()
	case "status":
		return c.status(ctx)
	case "ssh":
		return c.ssh(ctx, rest)
	case "kubectl":
		return c.kubectl(ctx, rest)
	case "load":
		return c.load(ctx, rest)
	default:
		return fmt.Errorf("unknown command %q\n%s", command, usage)
	}
}

var errNotUp = errors.New("no cluster is up; start it with: go run ./test/cluster up")

// cluster is a cluster that outlives the command that started it. A background
// process owns it, whose death would take it along; the others find it by the
// files in dir.
type cluster struct{ dir string }

func (c cluster) saved() string   { return filepath.Join(c.dir, "cluster.json") }
func (c cluster) log() string     { return filepath.Join(c.dir, "serve.log") }
func (c cluster) address() string { return filepath.Join(c.dir, "control") }

// dial reaches the owner, over the loopback because a socket's path would be
// too long in many cache folders.
func (c cluster) dial() (net.Conn, error) {
	addr, err := os.ReadFile(c.address())
	if os.IsNotExist(err) {
		return nil, errNotUp
	}
	if err != nil {
		return nil, err
	}
	port, secret, _ := strings.Cut(strings.TrimSpace(string(addr)), " ")
	conn, err := net.DialTimeout("tcp", port, 2*time.Second)
	if err != nil {
		return nil, fmt.Errorf("%w (its owner died: %w)", errNotUp, err)
	}
	// The port may belong to another program by now: only the owner says the
	// secret back.
	if err := conn.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	if _, err := fmt.Fprintln(conn, secret); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

func (c cluster) up(ctx context.Context) error {
	if conn, err := c.dial(); err == nil {
		conn.Close()
		fmt.Println("already up")
		return c.status(ctx)
	}
	if err := rig.Prerequisites(ctx); err != nil {
		return err
	}
	// The builds happen here, where a person sees them.
	tools, err := rig.BuildTools(ctx)
	if err != nil {
		return err
	}
	if _, err := rig.BuildNodeImage(ctx, tools); err != nil {
		return err
	}
	if err := os.RemoveAll(c.dir); err != nil {
		return err
	}
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return err
	}
	logFile, err := os.Create(c.log())
	if err != nil {
		return err
	}
	defer logFile.Close()
	self, err := c.keepProgram()
	if err != nil {
		return err
	}
	owner := exec.Command(self, "serve")
	owner.Stdout, owner.Stderr = logFile, logFile
	owner.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := owner.Start(); err != nil {
		return fmt.Errorf("starting the cluster's owner: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- owner.Wait() }()
	slog.InfoContext(ctx, "starting the cluster, which takes a minute or two", "log", c.log())
	for {
		if _, err := os.Stat(c.saved()); err == nil {
			return c.status(ctx)
		}
		select {
		case err := <-ended:
			said, _ := os.ReadFile(c.log())
			return fmt.Errorf("the cluster did not start: %v\n%s", err, said)
		case <-ctx.Done():
			err := owner.Process.Signal(syscall.SIGTERM)
			<-ended
			return errors.Join(ctx.Err(), err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// keepProgram copies this program, because go run removes it when we end.
func (c cluster) keepProgram() (string, error) {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return "", err
	}
	defer self.Close()
	kept := filepath.Join(c.dir, "cluster")
	f, err := os.OpenFile(kept, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return "", err
	}
	if _, err := io.Copy(f, self); err != nil {
		return "", errors.Join(err, f.Close())
	}
	return kept, f.Close()
}

func (c cluster) serve(ctx context.Context) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	tools, err := rig.BuildTools(ctx)
	if err != nil {
		return err
	}
	image, err := rig.BuildNodeImage(ctx, tools)
	if err != nil {
		return err
	}
	cp, err := rig.StartControlPlane(ctx, filepath.Join(c.dir, "control-plane"), tools, rig.ControlPlaneOptions{Controllers: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cp.Stop()) }()
	node, err := rig.StartNode(ctx, cp, image, rig.NodeOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, node.Stop()) }()

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	secret := fmt.Sprintf("%d-%d", os.Getpid(), time.Now().UnixNano())
	if err := os.WriteFile(c.address(), []byte(l.Addr().String()+" "+secret+"\n"), 0o600); err != nil {
		return err
	}
	defer os.Remove(c.address())
	if err := rig.Save(c.saved(), cp, node); err != nil {
		return err
	}
	defer os.Remove(c.saved())

	asked := make(chan net.Conn)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				lines := bufio.NewScanner(conn)
				if lines.Scan() && lines.Text() == secret && lines.Scan() && lines.Text() == "down" {
					asked <- conn
					return
				}
				conn.Close()
			}()
		}
	}()
	select {
	case <-ctx.Done():
		return nil
	case conn := <-asked:
		// The connection closes when this process ends, which is how down
		// knows that everything has stopped.
		slog.InfoContext(ctx, "stopping", "asked by", conn.RemoteAddr())
		return nil
	}
}

func (c cluster) down() error {
	conn, err := c.dial()
	if errors.Is(err, errNotUp) {
		fmt.Println("not up")
		return nil
	}
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := fmt.Fprintln(conn, "down"); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, conn); err != nil {
		return fmt.Errorf("waiting for the cluster to stop: %w", err)
	}
	fmt.Println("down")
	return nil
}

func (c cluster) attach() (*rig.ControlPlane, *rig.Node, error) {
	conn, err := c.dial()
	if err != nil {
		return nil, nil, err
	}
	if err := conn.Close(); err != nil {
		return nil, nil, err
	}
	return rig.Attach(c.saved())
}

func (c cluster) status(ctx context.Context) error {
	cp, node, err := c.attach()
	if err != nil {
		return err
	}
	fmt.Print(rig.Describe(cp, node))
	fmt.Println("or: go run ./test/cluster ssh|kubectl|load …")
	return interactive(cp.KubectlCommand(ctx, "get", "nodes", "-o", "wide"))
}

func (c cluster) ssh(ctx context.Context, args []string) error {
	_, node, err := c.attach()
	if err != nil {
		return err
	}
	argv := append(node.SSHArgs(), args...)
	return interactive(exec.CommandContext(ctx, argv[0], argv[1:]...))
}

func (c cluster) kubectl(ctx context.Context, args []string) error {
	cp, _, err := c.attach()
	if err != nil {
		return err
	}
	return interactive(cp.KubectlCommand(ctx, args...))
}

func (c cluster) load(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New(usage)
	}
	_, node, err := c.attach()
	if err != nil {
		return err
	}
	for _, archive := range args {
		if err := node.LoadImage(ctx, archive); err != nil {
			return err
		}
	}
	return nil
}

func interactive(cmd *exec.Cmd) error {
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}
