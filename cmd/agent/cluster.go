package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

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

// kubeconfigFiles are where kubelets have their kubeconfig, for those whose flags
// can not be seen: k3s hides them, and a kubelet in a container names files that
// are not in the host's tree.
var kubeconfigFiles = []string{
	"/etc/kubernetes/kubelet.conf", "/var/lib/kubelet/kubeconfig", "/etc/kubernetes/kubeconfig",
	"/var/lib/rancher/k3s/agent/kubelet.kubeconfig", "/var/lib/rancher/rke2/agent/kubelet.kubeconfig",
}

// kubeconfigs is a host whose kubeconfigs can be asked for the address in them.
type kubeconfigs interface {
	host.View
	KubeconfigServer(name string) (string, error)
}

// kubeletServer finds the API server's address in the kubelet's kubeconfig.
func kubeletServer(h kubeconfigs) string {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	names := kubeconfigFiles
	if k, ok, _ := probes.FindKubelet(ctx, h); ok {
		if name := k.Kubeconfig(ctx, h); name != "" {
			names = append([]string{name}, names...)
		}
	}
	for _, name := range names {
		if server, err := h.KubeconfigServer(name); err == nil && server != "" {
			return server
		}
	}
	return ""
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
