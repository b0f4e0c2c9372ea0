package rig

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hosthygiene/agent/test/pki"
)

// hostFromGuest is the address under which a guest on QEMU's user network sees
// this machine's loopback, and thus the API server.
const hostFromGuest = "10.0.2.2"

// ControlPlaneOptions choose how much of a control plane to start.
type ControlPlaneOptions struct {
	// Controllers adds the controller manager and the scheduler. Without
	// them there are no DaemonSet pods and no default ServiceAccounts, but
	// the API server's answers to clients are all the same.
	Controllers bool
}

// ControlPlane is a running etcd and kube-apiserver, perhaps with controllers.
// The API server authorises with RBAC and the node authoriser, runs the
// NodeRestriction admission plugin, and audits every request at Metadata level.
type ControlPlane struct {
	dir   string
	tools Tools
	opts  ControlPlaneOptions
	ca    *pki.Authority
	port  int
	// etcdURL is where etcd answers without a certificate, on the loopback.
	etcdURL string

	supervisor *supervisor
	egress     *egress
	client     *http.Client
	apiArgs    []string

	mu        sync.Mutex
	api, etcd *process
	others    []*process
	nodes     int
	stopped   bool
}

// StartControlPlane starts a control plane whose state lives in dir, and waits
// until the API server is ready. Etcd and the API server alone take about four
// seconds. The caller must Stop it.
func StartControlPlane(ctx context.Context, dir string, tools Tools, opts ControlPlaneOptions) (*ControlPlane, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("starting a control plane: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("starting a control plane: %w", err)
	}
	cp := &ControlPlane{dir: dir, tools: tools, opts: opts, supervisor: newSupervisor()}
	if err := cp.start(ctx); err != nil {
		return nil, fmt.Errorf("starting a control plane: %w", errors.Join(err, cp.Stop()))
	}
	return cp, nil
}

func (cp *ControlPlane) start(ctx context.Context) error {
	ports, err := freePorts(3)
	if err != nil {
		return err
	}
	etcdPort, peerPort := ports[1], ports[2]
	cp.port = ports[0]
	cp.ca = pki.NewAuthority("kubernetes")
	if cp.egress, err = startEgress(cp.ca); err != nil {
		return err
	}
	if err := cp.writeFiles(); err != nil {
		return err
	}
	cp.etcdURL = fmt.Sprintf("http://127.0.0.1:%d", etcdPort)
	peerURL := fmt.Sprintf("http://127.0.0.1:%d", peerPort)
	cp.etcd, err = cp.supervisor.start(cp.dir, "etcd", cp.tools.Path("etcd"),
		"--data-dir="+cp.file("etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls="+cp.etcdURL, "--advertise-client-urls="+cp.etcdURL,
		"--listen-peer-urls="+peerURL, "--initial-advertise-peer-urls="+peerURL,
		"--initial-cluster=default="+peerURL)
	if err != nil {
		return err
	}
	cp.apiArgs = []string{cp.tools.Path("kube-apiserver"),
		"--etcd-servers=" + cp.etcdURL,
		"--bind-address=127.0.0.1", "--secure-port=" + strconv.Itoa(cp.port),
		"--advertise-address=" + hostFromGuest,
		"--service-cluster-ip-range=10.96.0.0/16",
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
		"--client-ca-file=" + cp.file("ca.crt"),
		"--tls-cert-file=" + cp.file("apiserver.crt"), "--tls-private-key-file=" + cp.file("apiserver.key"),
		"--kubelet-client-certificate=" + cp.file("admin.crt"), "--kubelet-client-key=" + cp.file("admin.key"),
		"--kubelet-preferred-address-types=InternalIP",
		"--egress-selector-config-file=" + cp.file("egress.yaml"),
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=" + cp.file("sa.pub"), "--service-account-signing-key-file=" + cp.file("sa.key"),
		"--audit-policy-file=" + cp.file("audit.yaml"), "--audit-log-path=" + cp.AuditLog(),
	}
	if err := cp.StartAPIServer(ctx); err != nil {
		return err
	}
	if !cp.opts.Controllers {
		return nil
	}
	for _, c := range [][]string{
		{"kube-controller-manager", "--leader-elect=false", "--secure-port=0",
			"--use-service-account-credentials", "--root-ca-file=" + cp.file("ca.crt"),
			"--service-account-private-key-file=" + cp.file("sa.key")},
		{"kube-scheduler", "--leader-elect=false", "--secure-port=0"},
	} {
		config := cp.file(c[0] + ".conf")
		p, err := cp.supervisor.start(cp.dir, c[0], append([]string{cp.tools.Path(c[0]), "--kubeconfig=" + config}, c[1:]...)...)
		if err != nil {
			return err
		}
		cp.others = append(cp.others, p)
	}
	return nil
}

func (cp *ControlPlane) file(name string) string { return filepath.Join(cp.dir, name) }

func (cp *ControlPlane) writeFiles() error {
	serving := cp.ca.Issue("kube-apiserver", pki.For("127.0.0.1", "localhost", hostFromGuest, "10.96.0.1",
		"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"))
	admin := cp.ca.Issue("kubernetes-admin", pki.Of("system:masters"))
	manager := cp.ca.Issue("system:kube-controller-manager")
	scheduler := cp.ca.Issue("system:kube-scheduler")
	tokenKey := pki.NewKey()
	publicDER, err := x509.MarshalPKIXPublicKey(tokenKey.Public())
	if err != nil {
		return fmt.Errorf("making the key that signs tokens: %w", err)
	}
	here := cp.Server()
	for name, data := range map[string][]byte{
		"ca.crt":                       cp.ca.CertPEM(),
		"apiserver.crt":                serving.CertPEM(),
		"apiserver.key":                serving.KeyPEM(),
		"admin.crt":                    admin.CertPEM(),
		"admin.key":                    admin.KeyPEM(),
		"admin.conf":                   kubeconfig(cp.ca, here, "kubernetes-admin", admin),
		"kube-controller-manager.conf": kubeconfig(cp.ca, here, "system:kube-controller-manager", manager),
		"kube-scheduler.conf":          kubeconfig(cp.ca, here, "system:kube-scheduler", scheduler),
		"sa.key":                       pki.KeyPEM(tokenKey),
		"sa.pub":                       pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: publicDER}),
		"audit.yaml": []byte(`apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
`),
		"egress.yaml": fmt.Appendf(nil, `apiVersion: apiserver.k8s.io/v1beta1
kind: EgressSelectorConfiguration
egressSelections:
- name: cluster
  connection:
    proxyProtocol: HTTPConnect
    transport:
      tcp:
        url: https://%s
        tlsConfig:
          caBundle: %s
          clientCert: %s
          clientKey: %s
`, cp.egress.listener.Addr(), cp.file("ca.crt"), cp.file("admin.crt"), cp.file("admin.key")),
	} {
		if err := os.WriteFile(cp.file(name), data, 0o600); err != nil {
			return fmt.Errorf("writing the control plane's files: %w", err)
		}
	}
	return cp.connect()
}

// Kubeconfig is the path of an administrator's kubeconfig.
func (cp *ControlPlane) Kubeconfig() string { return cp.file("admin.conf") }

// Server is the API server's URL from this machine.
func (cp *ControlPlane) Server() string { return fmt.Sprintf("https://127.0.0.1:%d", cp.port) }

// EtcdURL is where etcd serves its clients and its own metrics.
func (cp *ControlPlane) EtcdURL() string { return cp.etcdURL }

// PIDs are the processes of the API server and of etcd, for what /proc tells of
// them. The API server's changes with StartAPIServer.
func (cp *ControlPlane) PIDs() (apiServer, etcd int, err error) {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	if cp.api == nil || cp.etcd == nil {
		return 0, 0, fmt.Errorf("naming the control plane's processes: %w", errNotOurs)
	}
	return cp.api.cmd.Process.Pid, cp.etcd.cmd.Process.Pid, nil
}

// AuditLog is the path of the audit log, one JSON event a line.
func (cp *ControlPlane) AuditLog() string { return cp.file("audit.log") }

// Dir is the folder of the control plane's files and logs.
func (cp *ControlPlane) Dir() string { return cp.dir }

// Kubectl runs kubectl as the administrator and returns its output.
func (cp *ControlPlane) Kubectl(ctx context.Context, args ...string) (string, error) {
	return output(cp.KubectlCommand(ctx, args...))
}

// KubectlCommand prepares kubectl as the administrator, for callers that give
// it input or read its output as it comes.
func (cp *ControlPlane) KubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	flags := []string{"--kubeconfig", cp.Kubeconfig(), "--cache-dir", cp.file("kubectl-cache")}
	return exec.CommandContext(ctx, cp.tools.Path("kubectl"), append(flags, args...)...)
}

// get asks the API server as the administrator.
func (cp *ControlPlane) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, cp.Server()+path, nil)
	if err != nil {
		return nil, fmt.Errorf("asking the API server for %s: %w", path, err)
	}
	resp, err := cp.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("asking the API server for %s: %w", path, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("asking the API server for %s: %w", path, err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("asking the API server for %s: %s: %.300s", path, resp.Status, body)
	}
	return body, nil
}

// StartAPIServer starts the API server on its port again after StopAPIServer.
func (cp *ControlPlane) StartAPIServer(ctx context.Context) error {
	if cp.supervisor == nil {
		return fmt.Errorf("starting the API server: %w", errNotOurs)
	}
	p, err := cp.supervisor.start(cp.dir, "kube-apiserver", cp.apiArgs...)
	if err != nil {
		return err
	}
	cp.mu.Lock()
	cp.api = p
	cp.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	return p.until(ctx, "the API server", 100*time.Millisecond, func(ctx context.Context) error {
		_, err := cp.get(ctx, "/readyz")
		return err
	})
}

// StopAPIServer ends the API server: connections are refused until
// StartAPIServer. Etcd keeps the state.
func (cp *ControlPlane) StopAPIServer() error {
	cp.mu.Lock()
	p := cp.api
	cp.mu.Unlock()
	if p == nil {
		return fmt.Errorf("stopping the API server: %w", errNotOurs)
	}
	// Its orderly end waits for watches; an outage does not.
	return p.stop(0)
}

// PauseAPIServer freezes the API server: connections are accepted and never
// answered, until ResumeAPIServer.
func (cp *ControlPlane) PauseAPIServer() error {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	if err := cp.api.signal(syscall.SIGSTOP); err != nil {
		return err
	}
	// Its threads stop one after the other, and until the last has, a request
	// may still be answered.
	for {
		err := unix.Waitid(unix.P_PID, cp.api.cmd.Process.Pid, nil, unix.WSTOPPED, nil)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("waiting for the API server to freeze: %w", err)
		}
	}
}

// ResumeAPIServer undoes PauseAPIServer.
func (cp *ControlPlane) ResumeAPIServer() error {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	return cp.api.signal(syscall.SIGCONT)
}

// Stop ends everything the control plane started. It may be called twice.
func (cp *ControlPlane) Stop() error {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	if cp.stopped {
		return nil
	}
	cp.stopped = true
	var errs []error
	for _, p := range cp.others {
		errs = append(errs, p.stop(5*time.Second))
	}
	errs = append(errs, cp.api.stop(2*time.Second), cp.etcd.stop(5*time.Second))
	if cp.egress != nil {
		errs = append(errs, cp.egress.close())
	}
	cp.supervisor.close()
	return errors.Join(errs...)
}
