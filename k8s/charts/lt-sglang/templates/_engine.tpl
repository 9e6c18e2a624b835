{{- define "lt.engineArgs" -}}
{{- $e := .Values.engine }}{{ $t := .Values.lightTransfer -}}
- serve
- {{ printf "--model-path=%s" (include "lt.modelPath" .) | quote }}
- {{ printf "--served-model-name=%s" (include "lt.servedName" .) | quote }}
- --tp-size={{ int $e.tensorParallel }}
- --host=0.0.0.0
- --port={{ int $e.port }}
- --enable-metrics
- --mem-fraction-static={{ $e.gpu.memoryFraction }}
- --chunked-prefill-size={{ int $e.chunkedPrefillSize }}
{{- if $e.contextLength }}
- --context-length={{ int $e.contextLength }}
{{- end }}
- --lt-mode={{ $t.mode }}
{{- if $t.lazyLayers }}
- {{ printf "--lt-lazy-layers=%s" $t.lazyLayers | quote }}
{{- end }}
{{- range $flag, $value := dict "keep" $t.keep "score" $t.score "decide" $t.decide }}
{{- if not (kindIs "invalid" $value) }}
- {{ printf "--lt-%s=%v" $flag $value | quote }}
{{- end }}
{{- end }}
{{- if $t.checkTables }}
- --lt-check-tables=on
{{- end }}
{{- range $flag, $value := dict "sink-tokens" $t.sinkTokens "recent-tokens" $t.recentTokens "kv-bytes" $t.kvBytes "last-queries" $t.lastQueries }}
{{- if not (kindIs "invalid" $value) }}
- --lt-{{ $flag }}={{ int $value }}
{{- end }}
{{- end }}
{{- if $e.apiKeySecret.name }}
- --api-key=$(LT_API_KEY)
{{- end }}
{{- if eq $e.kind "LeaderWorkerSet" }}
- --nnodes=$(LWS_GROUP_SIZE)
- --node-rank=$(LWS_WORKER_INDEX)
- --dist-init-addr=$(LWS_LEADER_ADDRESS):20000
{{- end }}
{{- if and .Values.tracing.endpoint .Values.tracing.engines }}
- --enable-trace
- {{ printf "--otlp-traces-endpoint=%s" .Values.tracing.endpoint | quote }}
{{- end }}
{{- range $e.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{- define "lt.engineEnv" -}}
- name: HOME
  value: /scratch
- name: HF_HUB_OFFLINE
  value: "1"
# A model's own code (--trust-remote-code) is copied before it is imported, and the model's volume is read-only.
- name: HF_MODULES_CACHE
  value: /scratch/hf-modules
{{- if include "lt.compileClaim" . }}
# Another image has another compiler, so a folder of its own.
- name: LT_CACHE
  value: {{ printf "/kernels/%s" (.Values.image.digest | default .Values.image.tag | default .Chart.AppVersion | replace ":" "-") | quote }}
{{- end }}
{{- if .Values.engine.apiKeySecret.name }}
{{ include "lt.secretEnv" (list "LT_API_KEY" .Values.engine.apiKeySecret) }}
{{- end }}
{{- if .Values.adminKeySecret.name }}
{{ include "lt.secretEnv" (list "LT_SGLANG_ADMIN_API_KEY" .Values.adminKeySecret) }}
{{- end }}
{{- with .Values.engine.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* /health_generate makes a token; /ready is cheap. Both answer after the weights are loaded. */ -}}
{{- define "lt.engineProbes" -}}
{{- $generate := dict "path" "/health_generate" "port" "http" -}}
{{- $startup := dict "httpGet" $generate "periodSeconds" 10 "timeoutSeconds" 30 "failureThreshold" (mul .Values.engine.startupMinutes 6) -}}
{{- $ready := dict "httpGet" (dict "path" "/ready" "port" "http") "periodSeconds" 5 "timeoutSeconds" 5 "failureThreshold" 2 -}}
{{- $live := dict "httpGet" $generate "periodSeconds" 30 "timeoutSeconds" 30 "failureThreshold" 3 -}}
{{- $p := .Values.engine.probes -}}
startupProbe:
  {{- mergeOverwrite $startup $p.startup | toYaml | nindent 2 }}
readinessProbe:
  {{- mergeOverwrite $ready $p.readiness | toYaml | nindent 2 }}
livenessProbe:
  {{- mergeOverwrite $live $p.liveness | toYaml | nindent 2 }}
{{- end }}

{{- define "lt.engineResources" -}}
{{- $e := .Values.engine -}}
resources:
  {{- range list "requests" "limits" }}
  {{ . }}:
    cpu: {{ int $e.cpu }}
    memory: {{ int $e.memoryGiB }}Gi
    {{ $e.gpu.resource | quote }}: {{ ternary $e.gpu.perNode $e.tensorParallel (eq $e.kind "LeaderWorkerSet") }}
    {{- with $e.extraResources }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
{{- end }}

{{- define "lt.engineMounts" -}}
{{- if not .Values.model.url -}}
- name: models
  mountPath: /models
  readOnly: true
{{ end -}}
- name: scratch
  mountPath: /scratch
- name: tmp
  mountPath: /tmp
- name: shm
  mountPath: /dev/shm
{{- if include "lt.compileClaim" . }}
- name: kernels
  mountPath: /kernels
{{- end }}
{{- with .Values.engine.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* Call with (list . true) for a container that serves HTTP, (list . false) for another node's. */ -}}
{{- define "lt.engineContainer" -}}
{{- $ := index . 0 }}{{ $e := $.Values.engine -}}
name: engine
image: {{ include "lt.image" (list $ $.Values.image) | quote }}
imagePullPolicy: {{ $.Values.image.pullPolicy }}
args:
  {{- include "lt.engineArgs" $ | nindent 2 }}
env:
  {{- include "lt.engineEnv" $ | nindent 2 }}
ports:
  - name: http
    containerPort: {{ int $e.port }}
    protocol: TCP
{{- if index . 1 }}
{{ include "lt.engineProbes" $ }}
{{- end }}
lifecycle:
  preStop:
    exec:
      command: [sleep, {{ $e.preStopSeconds | toString | quote }}]
{{ include "lt.engineResources" $ }}
securityContext:
  {{- mergeOverwrite (include "lt.containerSecurity" $ | fromYaml) $e.securityContext | toYaml | nindent 2 }}
volumeMounts:
  {{- include "lt.engineMounts" $ | nindent 2 }}
{{- end }}

{{- define "lt.waitContainer" -}}
name: wait-for-model
image: {{ include "lt.image" (list . .Values.image) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command: [sh, -c]
args: ['until [ -f "$0" ]; do echo "waiting for $0"; sleep 10; done', {{ include "lt.marker" . | quote }}]
resources:
  requests: {cpu: 50m, memory: 64Mi}
  limits: {cpu: 50m, memory: 64Mi}
securityContext:
  {{- include "lt.containerSecurity" . | nindent 2 }}
volumeMounts:
  - name: models
    mountPath: /models
    readOnly: true
{{- end }}

{{- define "lt.engineVolumes" -}}
{{- if not .Values.model.url -}}
- name: models
  persistentVolumeClaim:
    claimName: {{ include "lt.claim" . | quote }}
    readOnly: true
{{ end -}}
- name: scratch
  emptyDir: {sizeLimit: 20Gi}
- name: tmp
  emptyDir: {sizeLimit: 4Gi}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ int .Values.engine.sharedMemoryGiB }}Gi}
{{- with include "lt.compileClaim" . }}
- name: kernels
  persistentVolumeClaim: {claimName: {{ . | quote }}}
{{- end }}
{{- with .Values.engine.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* Longest generation, the time to be forgotten, and 20 s for SGLang to stop its schedulers. */ -}}
{{- define "lt.gracePeriod" -}}
{{ add .Values.engine.drainSeconds .Values.engine.preStopSeconds 20 }}
{{- end }}

{{- define "lt.progressDeadline" -}}
{{ add (mul .Values.engine.startupMinutes 60) (include "lt.gracePeriod" .) 300 }}
{{- end }}

{{- define "lt.enginePodMeta" -}}
{{- $ := index . 0 -}}
labels: { {{- include "lt.selectorKeys" (list $ "engine") }}{{ if index . 1 }}, lt-sglang/serves: http{{ end }}{{ with $.Values.canaryOf }}, lt-sglang/canary-of: {{ . | quote }}{{ end }}{{ include "lt.moreKeys" $.Values.engine.podLabels -}} }
{{- with $.Values.engine.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Where pods with an engine's GPUs run. */ -}}
{{- define "lt.placement" -}}
{{- $e := .Values.engine -}}
{{- include "lt.pullSecrets" . | trim }}
{{- with $e.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with $e.schedulerName }}
schedulerName: {{ . | quote }}
{{- end }}
{{- with $e.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with include "lt.nodeSelector" . }}
nodeSelector:
  {{- . | nindent 2 }}
{{- end }}
{{- with $e.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $e.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "lt.enginePodSpec" -}}
{{- $ := index . 0 }}{{ $e := $.Values.engine -}}
serviceAccountName: {{ include "lt.engine" $ }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ include "lt.gracePeriod" $ }}
securityContext:
  {{- mergeOverwrite (include "lt.podSecurity" $ | fromYaml) $e.podSecurityContext | toYaml | nindent 2 }}
{{ include "lt.placement" $ }}
{{- if eq $e.kind "Deployment" }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{ include "lt.selector" (list $ "engine") }}
{{- end }}
{{- if or (include "lt.downloads" $) $e.extraInitContainers }}
initContainers:
  {{- if include "lt.downloads" $ }}
  - {{ include "lt.waitContainer" $ | nindent 4 | trim }}
  {{- end }}
  {{- with $e.extraInitContainers }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
containers:
  - {{ include "lt.engineContainer" . | nindent 4 | trim }}
volumes:
  {{- include "lt.engineVolumes" $ | nindent 2 }}
{{- end }}

{{- /* Under autoscaling those that run now: without a number here, switching it on would leave one. Where there is no
cluster to ask (helm template), none is written. Call with (list . apiVersion kind). */ -}}
{{- define "lt.replicas" -}}
{{- $ := index . 0 -}}
{{- if $.Values.autoscaling.enabled -}}
{{- $live := lookup (index . 1) (index . 2) $.Release.Namespace (include "lt.engine" $) | default dict -}}
{{- with dig "spec" "replicas" 0 $live }}
replicas: {{ max (int .) (int $.Values.autoscaling.minReplicas) }}
{{- end }}
{{- else }}
replicas: {{ int $.Values.engine.replicas }}
{{- end }}
{{- end }}

{{- define "lt.podsOrShare" }}{{ if kindIs "string" . }}{{ . | quote }}{{ else }}{{ int . }}{{ end }}{{ end }}

{{- /* The user's labels of the workload, and Kueue's. */ -}}
{{- define "lt.engineLabels" -}}
{{- with .Values.engine.queue }}kueue.x-k8s.io/queue-name: {{ . | quote }}
{{ end }}
{{- with .Values.engine.labels }}{{ toYaml . }}{{ end }}
{{- end }}
