package rig

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// Tools are the compiled programs of a Kubernetes cluster.
type Tools struct {
	// Dir holds kube-apiserver, kube-controller-manager, kube-scheduler,
	// kube-proxy, kubelet, kubectl and etcd.
	Dir string
	// Version is the Kubernetes version, such as v1.36.3.
	Version string
}

// Path returns the path of one program.
func (t Tools) Path(name string) string { return filepath.Join(t.Dir, name) }

// BuildTools compiles the programs that the module in test/tools names, or
// finds them in the cache. The first build takes minutes.
func BuildTools(ctx context.Context) (Tools, error) {
	src, err := sourceDir(ctx)
	if err != nil {
		return Tools{}, err
	}
	src = filepath.Join(src, "test", "tools")
	mod, err := os.ReadFile(filepath.Join(src, "go.mod"))
	if err != nil {
		return Tools{}, fmt.Errorf("reading which programs to build: %w", err)
	}
	sum, err := os.ReadFile(filepath.Join(src, "go.sum"))
	if err != nil {
		return Tools{}, fmt.Errorf("reading which programs to build: %w", err)
	}
	m := regexp.MustCompile(`k8s\.io/kubernetes (v1\.(\d+)\.\S+)`).FindSubmatch(mod)
	if m == nil {
		return Tools{}, fmt.Errorf("%s/go.mod requires no version of k8s.io/kubernetes", src)
	}
	version, minor := string(m[1]), string(m[2])
	compiler, err := run(ctx, src, nil, "go", "env", "GOVERSION", "GOARCH")
	if err != nil {
		return Tools{}, fmt.Errorf("asking for the Go version: %w", err)
	}
	const pkg = "k8s.io/component-base/version."
	// Without a version the API server believes it is v0.0.0 and refuses
	// its own feature gates. The symbol tables go because the programs are
	// loaded by an emulated machine.
	ldflags := strings.Join([]string{"-s", "-w",
		"-X " + pkg + "gitVersion=" + version, "-X " + pkg + "gitMajor=1",
		"-X " + pkg + "gitMinor=" + minor, "-X " + pkg + "gitTreeState=clean"}, " ")
	key := version + "-" + digest(mod, sum, []byte(compiler), []byte(ldflags))

	dir, err := cached(ctx, "tools", key, func(ctx context.Context, dir string) error {
		slog.InfoContext(ctx, "compiling Kubernetes, which takes minutes", "version", version)
		env := []string{"CGO_ENABLED=0", "GOWORK=off"}
		if _, err := run(ctx, src, env, "go", "build", "-trimpath", "-ldflags", ldflags, "-o", dir+"/", "tool"); err != nil {
			return fmt.Errorf("compiling Kubernetes %s: %w", version, err)
		}
		// The go command names a program after its import path, and etcd's
		// ends in server/v3.
		if err := os.Rename(filepath.Join(dir, "server"), filepath.Join(dir, "etcd")); err != nil {
			return fmt.Errorf("naming etcd: %w", err)
		}
		return nil
	})
	if err != nil {
		return Tools{}, err
	}
	return Tools{Dir: dir, Version: version}, nil
}

// sourceDir is the root of this repository, which the go command knows.
func sourceDir(ctx context.Context) (string, error) {
	out, err := run(ctx, "", nil, "go", "list", "-f", "{{.Module.Dir}}", "github.com/hosthygiene/agent/test/rig")
	if err != nil {
		return "", fmt.Errorf("finding the source folder: %w", err)
	}
	return strings.TrimSpace(out), nil
}

// digest is a short name for the content of all its arguments.
func digest(parts ...[]byte) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d\n", len(p))
		h.Write(p)
	}
	return hex.EncodeToString(h.Sum(nil))[:12]
}
