package cluster

import (
	"context"
	"errors"
	"io"
	"net/http"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/remotecommand"
	utilexec "k8s.io/client-go/util/exec"
	"k8s.io/streaming/pkg/httpstream"
)

// Exec runs a command in the agent's container of a pod, without input and
// without a terminal, and returns its exit code. Over a WebSocket, or SPDY where
// something on the way does not let that through.
func (c *Client) Exec(ctx context.Context, pod corev1.Pod, command []string, out, errOut io.Writer) (int, error) {
	container := pod.Spec.Containers[0].Name
	for _, other := range pod.Spec.Containers { // an injected one may come first
		if other.Name == "agent" {
			container = other.Name
		}
	}
	req := c.rest.Post().Namespace(pod.Namespace).Resource("pods").Name(pod.Name).SubResource("exec").
		Param("container", container).Param("stdout", "true").Param("stderr", "true")
	for _, word := range command {
		req.Param("command", word)
	}
	socket, err := remotecommand.NewWebSocketExecutor(c.config, http.MethodGet, req.URL().String())
	if err != nil {
		return 0, err
	}
	spdy, err := remotecommand.NewSPDYExecutor(c.config, http.MethodPost, req.URL())
	if err != nil {
		return 0, err
	}
	executor, err := remotecommand.NewFallbackExecutor(socket, spdy, func(err error) bool {
		return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
	})
	if err != nil {
		return 0, err
	}
	err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: out, Stderr: errOut})
	var exit utilexec.CodeExitError
	if errors.As(err, &exit) {
		return exit.Code, nil
	}
	return 0, wrap(err, "executing in the pod "+pod.Namespace+"/"+pod.Name)
}
