package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/probes"
)

// kubelet is this node's, asked directly and with the pod's token: through the API
// server it would take nodes/proxy, which also allows exec into every pod.
type kubelet struct {
	address           string // host:port
	tokenFile, caFile string
	// names are those of this node, one of which a certificate of the cluster's
	// must be for.
	names []string
	view  func() host.View // of the host
	limit int64            // of an answer, in bytes

	client *http.Client
}

// kubeletClient returns what asks the kubelet; nil outside a pod.
func kubeletClient(node string, view func() host.View) func(ctx context.Context, path string, read func(io.Reader) error) error {
	if _, err := os.Stat(tokenFile); err != nil {
		return nil
	}
	k := kubelet{tokenFile: tokenFile, caFile: clusterCAFile, names: []string{node}, view: view, limit: host.MaxKubeletAnswer}
	addr := os.Getenv("HOST_IP")
	if addr != "" {
		k.names = append(k.names, addr)
	} else {
		addr = "127.0.0.1" // which is no name: it is every node's
	}
	k.address = net.JoinHostPort(addr, "10250")
	k.connect()
	return k.get
}

// connect makes the client. It follows no redirect, for the token is this
// kubelet's to see, and asks no proxy.
func (k *kubelet) connect() {
	k.client = &http.Client{
		Timeout: 10 * time.Second,
		Transport: &http.Transport{
			TLSClientConfig: &tls.Config{
				// The kubelet's serving certificate is mostly self-signed; it is
				// compared with what lies on the host instead.
				InsecureSkipVerify: true,
				VerifyConnection:   func(state tls.ConnectionState) error { return k.verify(state.PeerCertificates) },
				MinVersion:         tls.VersionTLS12,
			},
			// Two probes of a pass ask at a time, and the next pass is a minute later:
			// a handshake is most of what a question costs.
			MaxIdleConns: 2, IdleConnTimeout: 90 * time.Second,
			MaxResponseHeaderBytes: 64 << 10,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// get does one GET and hands the answer to read.
func (k *kubelet) get(ctx context.Context, path string, read func(io.Reader) error) error {
	token, err := os.ReadFile(k.tokenFile)
	if err != nil {
		return fmt.Errorf("%w: %w", host.ErrNotConfigured, err)
	}
	u := url.URL{Scheme: "https", Host: k.address, Path: path}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	resp, err := k.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		head, _ := io.ReadAll(io.LimitReader(resp.Body, 200))
		return fmt.Errorf("the kubelet answers %.100s to %s: %s", resp.Status, req.URL.Path, bytes.TrimSpace(head))
	}
	body := &answer{r: resp.Body, limit: k.limit, left: k.limit}
	if err := read(body); err != nil {
		// What went wrong on the way is more than what the parser makes of it.
		return cmp.Or(body.err, err)
	}
	return nil
}

// answer is a body with an end, and remembers why it could not be read.
type answer struct {
	r           io.Reader
	limit, left int64
	err         error
}

func (a *answer) Read(p []byte) (int, error) {
	if a.left <= 0 {
		a.err = fmt.Errorf("the kubelet's answer: %w of %d bytes", host.ErrTooLarge, a.limit)
		return 0, a.err
	}
	n, err := a.r.Read(p[:min(int64(len(p)), a.left)])
	a.left -= int64(n)
	if err != nil && err != io.EOF {
		a.err = err
	}
	return n, err
}

// verify accepts a certificate that the cluster's CA has signed for this node, or
// that lies on this host where the kubelet keeps its own: nobody but root can serve
// with it. Any pod of the host's network may take the port of a kubelet that is
// down, and the CA signs for others too: other nodes, and on many clusters whatever
// a CertificateSigningRequest was approved for.
func (k *kubelet) verify(chain []*x509.Certificate) error {
	if len(chain) == 0 {
		return errors.New("the kubelet sent no certificate")
	}
	leaf := chain[0]
	pool := x509.NewCertPool()
	if ca, err := os.ReadFile(k.caFile); err == nil {
		pool.AppendCertsFromPEM(ca)
	}
	_, err := leaf.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	signed := err == nil
	if signed && slices.ContainsFunc(k.names, func(name string) bool { return leaf.VerifyHostname(name) == nil }) {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	for _, name := range probes.KubeletServingFiles(ctx, k.view()) {
		ders, err := k.view().Certificates(ctx, name) // the key may lie beside them
		if err == nil && slices.ContainsFunc(ders, func(der []byte) bool { return bytes.Equal(der, leaf.Raw) }) {
			return nil
		}
	}
	if signed {
		return fmt.Errorf("the kubelet's certificate is for another host than %s, and not the one on this host", strings.Join(k.names, " or "))
	}
	return errors.New("the kubelet's certificate is neither signed by the cluster's CA nor the one on this host")
}
