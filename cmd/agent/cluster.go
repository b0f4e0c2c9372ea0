package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"

	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/probes"
	"github.com/hosthygiene/agent/pkg/report"
)

const (
	serviceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount/"
	tokenFile         = serviceAccountDir + "token"
	clusterCAFile     = serviceAccountDir + "ca.crt"
)

// restConfigs returns the ways to the API server: with a kubeconfig that alone,
// in a pod the Service and then the address the kubelet uses, which works
// before kube-proxy does. Both are used with the pod's own token.
func restConfigs(kubeconfig string, h *host.Host) ([]*rest.Config, error) {
	if kubeconfig != "" {
		c, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
		if err != nil {
			return nil, err
		}
		c.UserAgent = userAgent()
		return []*rest.Config{c}, nil
	}
	c, err := rest.InClusterConfig()
	if err != nil {
		return nil, fmt.Errorf("not in a pod with a service account, and no --kubeconfig: %w", err)
	}
	c.UserAgent = userAgent()
	configs := []*rest.Config{c}
	if server := kubeletServer(h); server != "" && server != c.Host {
		direct := rest.CopyConfig(c)
		direct.Host = server
		configs = append(configs, direct)
	}
	return configs, nil
}

func userAgent() string { return "host-hygiene-agent/" + version }

// kubeletServer finds the API server's address in the kubelet's kubeconfig.
func kubeletServer(h *host.Host) string {
	for _, name := range []string{
		"/etc/kubernetes/kubelet.conf", "/var/lib/kubelet/kubeconfig", "/etc/kubernetes/kubeconfig",
		"/var/lib/rancher/k3s/agent/kubelet.kubeconfig", "/var/lib/rancher/rke2/agent/kubelet.kubeconfig",
	} {
		if server, err := h.KubeconfigServer(name); err == nil && server != "" {
			return server
		}
	}
	return ""
}

// cluster is what probes can know of the cluster.
type cluster struct {
	publisher *report.Publisher
	api       *report.API
	// known returns when the Node has been seen, or is no longer awaited.
	known func()
}

// Node implements [probes.Cluster].
func (c cluster) Node() (probes.Node, bool) {
	// Or what the agent before us found by it would clear and come again.
	c.known()
	n := c.publisher.Node()
	if n == nil {
		return probes.Node{}, false
	}
	node := probes.Node{KubeletVersion: n.Status.NodeInfo.KubeletVersion}
	for _, cond := range n.Status.Conditions {
		node.Conditions = append(node.Conditions, probes.NodeCondition{Type: cond.Type, Status: cond.Status, Heartbeat: cond.LastHeartbeatTime.Time})
	}
	return node, true
}

// Version implements [probes.Cluster].
func (c cluster) Version(ctx context.Context) (string, error) { return c.api.Version(ctx) }

// kubeletClient asks the kubelet of this node with the pod's token, directly:
// through the API server it would take nodes/proxy, which also allows exec into
// every pod. It returns nil outside a pod.
func kubeletClient(files func() host.Files) func(ctx context.Context, path string, read func(io.Reader) error) error {
	if _, err := os.Stat(tokenFile); err != nil {
		return nil
	}
	addr := os.Getenv("HOST_IP")
	if addr == "" {
		addr = "127.0.0.1"
	}
	client := &http.Client{
		Timeout: 10 * time.Second,
		Transport: &http.Transport{
			TLSClientConfig: &tls.Config{
				// The kubelet's serving certificate is mostly self-signed; it is
				// compared with what lies on the host below.
				InsecureSkipVerify: true,
				VerifyConnection: func(state tls.ConnectionState) error {
					return verifyKubelet(files(), state.PeerCertificates)
				},
				MinVersion: tls.VersionTLS12,
			},
			MaxIdleConns: 1, IdleConnTimeout: 90 * time.Second,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return func(ctx context.Context, path string, read func(io.Reader) error) error {
		token, err := os.ReadFile(tokenFile)
		if err != nil {
			return fmt.Errorf("%w: %w", host.ErrNotConfigured, err)
		}
		u := url.URL{Scheme: "https", Host: net.JoinHostPort(addr, "10250"), Path: path}
		return getKubelet(ctx, client, u.String(), strings.TrimSpace(string(token)), read)
	}
}

// getKubelet does one GET and hands the answer to read.
func getKubelet(ctx context.Context, client *http.Client, address, token string, read func(io.Reader) error) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		head, _ := io.ReadAll(io.LimitReader(resp.Body, 200))
		return fmt.Errorf("the kubelet answers %s to %s: %s", resp.Status, req.URL.Path, bytes.TrimSpace(head))
	}
	body := &answer{r: resp.Body, left: host.MaxKubeletAnswer}
	if err := read(body); err != nil {
		// What went wrong on the way is more than what the parser makes of it.
		return cmp.Or(body.err, err)
	}
	return nil
}

// answer is a body with an end, and remembers why it could not be read.
type answer struct {
	r    io.Reader
	left int64
	err  error
}

func (a *answer) Read(p []byte) (int, error) {
	if a.left <= 0 {
		a.err = fmt.Errorf("the kubelet's answer: %w of %d bytes", host.ErrTooLarge, int64(host.MaxKubeletAnswer))
		return 0, a.err
	}
	n, err := a.r.Read(p[:min(int64(len(p)), a.left)])
	a.left -= int64(n)
	if err != nil && err != io.EOF {
		a.err = err
	}
	return n, err
}

// kubeletCertFiles are where a kubelet keeps its serving certificate when its
// config names no other.
var kubeletCertFiles = []string{"/var/lib/kubelet/pki/kubelet.crt", "/var/lib/kubelet/pki/kubelet-server-current.pem"}

// verifyKubelet accepts a certificate that the cluster's CA has signed, or that
// lies on this host where the kubelet keeps its own: nobody but root can serve
// with it on port 10250.
func verifyKubelet(files host.Files, chain []*x509.Certificate) error {
	if len(chain) == 0 {
		return errors.New("the kubelet sent no certificate")
	}
	leaf := chain[0]
	pool := x509.NewCertPool()
	if ca, err := os.ReadFile(clusterCAFile); err == nil {
		pool.AppendCertsFromPEM(ca)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	names := kubeletCertFiles
	if data, err := files.ReadFile(ctx, "/var/lib/kubelet/config.yaml"); err == nil {
		var config struct {
			TLSCertFile string `json:"tlsCertFile"`
		}
		if yaml.Unmarshal(data, &config) == nil && config.TLSCertFile != "" {
			names = []string{config.TLSCertFile}
		}
	}
	for _, name := range names {
		data, err := files.ReadFile(ctx, name)
		if err != nil {
			continue
		}
		for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
			if block.Type == "CERTIFICATE" && bytes.Equal(block.Bytes, leaf.Raw) {
				return nil
			}
		}
	}
	return errors.New("the kubelet's certificate is neither signed by the cluster's CA nor the one on this host")
}

func newCleanup() *cobra.Command {
	var kubeconfig string
	var all, wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Delete the agent's Node conditions, for an uninstall",
		Long: `cleanup helps to leave nothing behind. With --wait it waits until no Node has a
condition of the agent's any more, after report.conditions was set to off. With
--all it deletes them itself from every Node, with an administrator's
kubeconfig: for dead nodes and after a hasty kubectl delete.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if all == wait {
				return exitError{exitUsage, errors.New("give one of --all and --wait")}
			}
			if kubeconfig == "" {
				kubeconfig = clientcmd.NewDefaultClientConfigLoadingRules().GetDefaultFilename()
			}
			c, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
			if err != nil {
				return exitError{exitUsage, err}
			}
			c.UserAgent = userAgent()
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			p := progress(cmd, "text")
			defer p.Done()
			var left []string
			if all {
				p.Say("deleting the conditions from every Node")
				left, err = report.CleanupAll(ctx, c, p.Over(cmd.OutOrStdout()))
			} else {
				p.Say("waiting until no Node has a condition of the agent's")
				left, err = report.WaitClean(ctx, c)
			}
			p.Done()
			if err != nil {
				return exitError{exitFinding, err}
			}
			if len(left) > 0 {
				return exitError{exitFinding, fmt.Errorf("conditions are left on %s", strings.Join(left, ", "))}
			}
			fmt.Fprintln(cmd.OutOrStdout(), "no Node has a condition of the agent's")
			return nil
		},
	}
	cmd.Flags().StringVar(&kubeconfig, "kubeconfig", "", "an administrator's kubeconfig `file`; as kubectl finds it without")
	cmd.Flags().BoolVar(&all, "all", false, "delete the conditions from every Node")
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until no Node has any")
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "how long to try")
	return cmd
}
