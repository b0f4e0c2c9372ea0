package rig

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"
)

// saved is what another process needs to know to use a running cluster.
type saved struct {
	Dir   string     `json:"dir"`
	Tools Tools      `json:"tools"`
	Port  int        `json:"port"`
	Node  *savedNode `json:"node,omitempty"`
}

type savedNode struct {
	Name        string `json:"name"`
	Dir         string `json:"dir"`
	Sockets     string `json:"sockets"`
	IP          string `json:"ip"`
	Key         string `json:"key"`
	Known       string `json:"known"`
	SSHPort     int    `json:"sshPort"`
	KubeletPort int    `json:"kubeletPort"`
	MetricsPort int    `json:"metricsPort"`
}

// Save notes in a file how to reach a running cluster, for Attach in another
// process. The node may be nil.
func Save(path string, cp *ControlPlane, n *Node) error {
	s := saved{Dir: cp.dir, Tools: cp.tools, Port: cp.port}
	if n != nil {
		s.Node = &savedNode{Name: n.name, Dir: n.dir, Sockets: n.sockets, IP: n.ip, Key: n.remote.key, Known: n.remote.known,
			SSHPort: n.ports.ssh, KubeletPort: n.ports.kubelet, MetricsPort: n.ports.metrics}
	}
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return fmt.Errorf("saving how to reach the cluster: %w", err)
	}
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return fmt.Errorf("saving how to reach the cluster: %w", err)
	}
	return os.Rename(path+".new", path)
}

// Attach uses a cluster that another process started and saved. Its processes
// are the other's: Stop does nothing, and stopping or pausing the API server or
// the time source is an error.
func Attach(path string) (*ControlPlane, *Node, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, fmt.Errorf("attaching to a cluster: %w", err)
	}
	var s saved
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, nil, fmt.Errorf("attaching to a cluster: reading %s: %w", path, err)
	}
	cp := &ControlPlane{dir: s.Dir, tools: s.Tools, port: s.Port, stopped: true}
	if err := cp.connect(); err != nil {
		return nil, nil, fmt.Errorf("attaching to a cluster: %w", err)
	}
	if s.Node == nil {
		return cp, nil, nil
	}
	n := &Node{name: s.Node.Name, dir: s.Node.Dir, sockets: s.Node.Sockets, ip: s.Node.IP, cp: cp, stopped: true,
		ports: nodePorts{ssh: s.Node.SSHPort, kubelet: s.Node.KubeletPort, metrics: s.Node.MetricsPort}}
	n.remote = remote{port: s.Node.SSHPort, key: s.Node.Key, known: s.Node.Known, control: n.sockets + "/ssh"}
	return cp, n, nil
}

// errNotOurs is what an attached handle says when asked to stop or start
// something.
var errNotOurs = errors.New("another process started it")

// connect makes the administrator's client from the control plane's files.
func (cp *ControlPlane) connect() error {
	cert, err := tls.LoadX509KeyPair(cp.file("admin.crt"), cp.file("admin.key"))
	if err != nil {
		return fmt.Errorf("reading the administrator's certificate: %w", err)
	}
	ca, err := os.ReadFile(cp.file("ca.crt"))
	if err != nil {
		return fmt.Errorf("reading the cluster's authority: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	cp.client = &http.Client{
		Timeout:   10 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}}},
	}
	return nil
}

// Describe says to a person how to use the cluster.
func Describe(cp *ControlPlane, n *Node) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Kubernetes %s\n", cp.tools.Version)
	fmt.Fprintf(&b, "  export KUBECONFIG=%s\n", cp.Kubeconfig())
	fmt.Fprintf(&b, "  kubectl:    %s\n", cp.tools.Path("kubectl"))
	fmt.Fprintf(&b, "  audit log:  %s\n", cp.AuditLog())
	if n != nil {
		fmt.Fprintf(&b, "node %s\n", n.name)
		fmt.Fprintf(&b, "  %s\n", strings.Join(n.SSHArgs(), " "))
		fmt.Fprintf(&b, "  kubelet:    https://127.0.0.1:%d\n", n.ports.kubelet)
		fmt.Fprintf(&b, "  metrics:    http://127.0.0.1:%d/metrics (once the agent runs)\n", n.ports.metrics)
		fmt.Fprintf(&b, "  console:    %s\n", n.Console())
		fmt.Fprintf(&b, "  QEMU (QMP): %s\n", n.qmpSocket())
	}
	return b.String()
}
