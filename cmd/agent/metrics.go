package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/exporter-toolkit/web"
	"go.yaml.in/yaml/v2"

	"github.com/hosthygiene/agent/pkg/report"
)

func metricsHandler(m *report.Metrics) http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(m, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	return mux
}

func newServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
}

// Reasons of the Events about the metrics' web config.
const (
	eventMetricsRefused = "MetricsNotServed"
	eventMetricsServed  = "MetricsServed"
)

// protectedMetrics serves metrics as a web config of the Prometheus exporters
// says: TLS, client certificates, passwords. Nothing is ever served past it: where
// it can not be followed, the port is closed, or answers nobody, until it can. The
// node is checked and reported all the same.
//
// Certificates, keys and passwords that are replaced on the disk hold from the
// next connection or request on (exporter-toolkit reads them each time); what
// needs a new listener, TLS switched on or off, within a minute.
type protectedMetrics struct {
	address, config string
	// every is how often the web config and what it names are looked at, retry
	// how often while something is wrong with them.
	every, retry time.Duration
	handler      http.Handler
	log          *slog.Logger
	// tell posts an Event about the node.
	tell func(kind, reason, subject, message string)
	// listening, if set, is called with the address of each new listener.
	listening func(net.Addr)

	told string // the last complaint
}

// run serves until ctx ends. An error is one of the listener.
func (p *protectedMetrics) run(ctx context.Context) error {
	for ctx.Err() == nil {
		c, err := readWebConfig(p.config)
		p.complain(err)
		if err != nil {
			pause(ctx, p.retry)
			continue
		}
		if err := p.serve(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// serve is over when ctx is, or when the config asks for another kind of listener.
func (p *protectedMetrics) serve(ctx context.Context, c *web.Config) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", p.address)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("listening on %s: %w", p.address, err)
	}
	p.log.Info("serving metrics", "address", l.Addr().String(), "tls", c.TLSConfig.IsEnabled(),
		"clientCertificates", cmp.Or(c.TLSConfig.ClientAuth, "NoClientCert"), "users", len(c.Users))
	if p.listening != nil {
		p.listening(l.Addr())
	}
	server := newServer(p.guard(p.handler), p.log)
	ended := make(chan error, 1)
	go func() {
		// Its log has pieces of the file in it; complain tells what is wrong.
		ended <- web.Serve(l, server, &web.FlagConfig{WebConfigFile: &p.config}, slog.New(slog.DiscardHandler))
	}()
	defer l.Close()
	defer server.Close()
	every := p.every
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-ended:
			// The file was replaced after it was judged; it is judged again.
			p.log.Debug("the metrics' listener ended", "error", plainWebError(err))
			pause(ctx, p.retry)
			return nil
		case <-time.After(every):
		}
		now, err := readWebConfig(p.config)
		p.complain(err)
		every = p.every
		if err != nil {
			every = p.retry
		} else if listenerOf(now) != listenerOf(c) {
			return nil
		}
	}
}

// guard answers nothing while the file asks for no protection: with passwords and
// without TLS exporter-toolkit would serve everybody once the last user is gone.
func (p *protectedMetrics) guard(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := readWebConfig(p.config); err != nil {
			http.Error(w, http.StatusText(http.StatusInternalServerError), http.StatusInternalServerError)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// complain tells of each change once, in the log and as an Event.
func (p *protectedMetrics) complain(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	switch {
	case text == p.told:
		return
	case err != nil:
		p.log.Error("metrics are not served until the web config is right; the node is checked and reported all the same", "error", text)
		p.tell("Warning", eventMetricsRefused, "metrics", text)
	default:
		p.log.Info("the web config is right, metrics are served")
		p.tell("Normal", eventMetricsServed, "metrics", "the web config is right, metrics are served")
	}
	p.told = text
}

// listener is what of a web config holds for as long as a listener is open.
type listener struct {
	tls, http2 bool
	limit      web.RateLimiterConfig
}

func listenerOf(c *web.Config) listener {
	return listener{c.TLSConfig.IsEnabled(), c.HTTPConfig.HTTP2, c.RateLimiterConfig}
}

// readWebConfig returns the web config in file, the certificates it names
// included in what is checked. The error holds nothing of the file that could be
// a secret.
func readWebConfig(file string) (*web.Config, error) {
	if err := web.Validate(file); err != nil {
		return nil, fmt.Errorf("web config %s: %w", file, plainWebError(err))
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("web config %s: %w", file, err)
	}
	c := web.Config{HTTPConfig: web.HTTPConfig{HTTP2: true}}
	if err := yaml.Unmarshal(data, &c); err != nil {
		return nil, fmt.Errorf("web config %s: %w", file, plainWebError(err))
	}
	if !c.TLSConfig.IsEnabled() && len(c.Users) == 0 {
		return nil, fmt.Errorf("web config %s: neither tls_server_config nor basic_auth_users: leave out --web.config.file to serve metrics to everybody", file)
	}
	return &c, nil
}

// webValue is where a parser's error repeats a value of the file.
var webValue = regexp.MustCompile("(?s)`.*?`|\\$2[a-z]?\\$[^\\s\"]*|-----BEGIN.*")

// plainWebError takes what may be a secret out of an error about a web config.
func plainWebError(err error) error {
	text := cmp.Or(err, errors.New("ended")).Error()
	if strings.HasPrefix(text, "crypto/bcrypt:") {
		// The library's own words show how the password begins.
		return errors.New("basic_auth_users: a password is no bcrypt hash, such as htpasswd -nB NAME prints")
	}
	return errors.New(strings.Join(strings.Fields(webValue.ReplaceAllLiteralString(text, "…")), " "))
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
